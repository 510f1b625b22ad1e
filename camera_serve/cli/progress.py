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
        yield _print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    status = TextColumn("{task.fields[status]}")
    with Bar(*columns, status, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, status="")

        def update(progress: "Progress") -> None:
            bar.update(
                task,
                description=progress.step,
                completed=progress.done,
                total=progress.total,
                status=_status(progress),
            )

        yield update


def _print_line(progress: "Progress") -> None:
    line = f"{progress.step}  {progress.done}/{progress.total} layers  {_status(progress)}"
    click.echo(line, err=True)


def _status(progress: "Progress") -> str:
    left = "" if progress.eta is None else f", {human_seconds(progress.eta)} left"
    peak = human_bytes(progress.peak_bytes)
    return f"{human_seconds(progress.elapsed)}{left}, peak memory {peak}"
