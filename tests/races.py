"""Runs in processes of their own, started at one moment."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from camera_serve.errors import CameraError
from camera_serve.progress import OnProgress, Progress

FORK = multiprocessing.get_context("fork")
SECONDS = 60
"""How long a run waits for another before it goes on."""

Run = Callable[[OnProgress], object]


def race(*runs: Run) -> list[str]:
    """How each run ended: an empty string, or its `CameraError`.

    A run that gets as far as its first report waits there until another one has ended.
    """
    started, ended = FORK.Barrier(len(runs)), FORK.Event()
    results = FORK.SimpleQueue()

    def wait(progress: Progress) -> None:
        ended.wait(SECONDS)

    def child(number: int, run: Run) -> None:
        started.wait(SECONDS)
        try:
            run(wait)
            results.put((number, ""))
        except CameraError as error:
            results.put((number, str(error)))
        finally:
            ended.set()

    children = [in_child(lambda n=n, run=run: child(n, run)) for n, run in enumerate(runs)]
    for process in children:
        process.join(2 * SECONDS)
        assert process.exitcode == 0
    return [message for _, message in sorted(results.get() for _ in runs)]


def in_child(run: Callable[[], object]) -> BaseProcess:
    """A forked process that runs it: everything is imported already."""
    child = FORK.Process(target=run)
    child.start()
    return child


def killed_in(run: Run, step: int = 0) -> int:
    """Run in a process that is killed at its report `step` of layers done; its id."""
    reached = FORK.Event()

    def stay(progress: Progress) -> None:
        if progress.done == step:
            reached.set()
            time.sleep(SECONDS)

    child = in_child(lambda: run(stay))
    assert reached.wait(SECONDS)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return child.pid or 0
