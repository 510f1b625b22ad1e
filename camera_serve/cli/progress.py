"""Progress on stderr: a live bar on a terminal, one line per report elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from camera_serve.cli.formatting import human_bytes, human_seconds
from camera_serve.cli.interrupts import interrupts_kept

if TYPE_CHECKING:
    from camera_serve.progress import OnProgress, Progress

SECONDS_APART = 10
"""Between two lines of a log about bytes."""


@contextmanager
def shown_progress() -> Iterator["OnProgress"]:
    """The `on_progress` a command passes to the core while it works; it raises interrupts too."""
    with interrupts_kept() as check, _shown() as show:

        def report(progress: "Progress") -> None:
            show(progress)
            check()

        yield report


@contextmanager
def _shown() -> Iterator["OnProgress"]:
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), "{task.fields[count]}", "{task.fields[status]}")
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, count="", status="")

        def update(progress: "Progress") -> None:
            bar.update(
                task,
                description=progress.step,
                completed=progress.done,
                total=progress.total,
                count=_count(progress),
                status=_status(progress),
            )

        yield update


def _lines() -> "OnProgress":
    """A line per layer; bytes are reported too often for that, so one in `SECONDS_APART`."""
    last = 0.0

    def show(progress: "Progress") -> None:
        nonlocal last
        early = progress.elapsed - last < SECONDS_APART and 0 < progress.done < progress.total
        if progress.unit == "bytes" and early:
            return
        last = progress.elapsed
        click.echo(f"{progress.step}  {_count(progress)}  {_status(progress)}", err=True)

    return show


def _count(progress: "Progress") -> str:
    if progress.unit == "bytes":
        return f"{human_bytes(progress.done)} of {human_bytes(progress.total)}"
    return f"{progress.done}/{progress.total} layers"


def _status(progress: "Progress") -> str:
    left = "" if progress.eta is None else f", {human_seconds(progress.eta)} left"
    peak = human_bytes(progress.peak_bytes)
    return f"{human_seconds(progress.elapsed)}{left}, peak memory {peak}"
