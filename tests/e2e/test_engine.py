"""Ranks that hang or fail end the wait for them, and say where they were."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e import engine

PROGRAMS = {
    "ends": "",
    "fails": "raise SystemExit(3)",
    "hangs": (
        "import faulthandler, signal, sys, time\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "def stuck_here(): print('ready', file=sys.stderr, flush=True); time.sleep(600)\n"
        "stuck_here()"
    ),
}


def start(program: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-c", PROGRAMS[program]], stderr=file)


@pytest.mark.parametrize(
    ("programs", "problem"),
    [
        (["ends", "ends"], ""),
        (["hangs", "fails"], "ranks ended with [None, 3] (None: it still ran)"),
        (["ends", "hangs"], "ranks [1] of 2 still run after 1 s"),
        (["hangs", "hangs"], "ranks [0, 1] of 2 still run after 1 s"),
    ],
)
def test_the_wait_for_ranks_ends_and_says_why(
    programs: list[str], problem: str, tmp_path: Path
) -> None:
    logs = [tmp_path / str(rank) for rank in range(len(programs))]
    processes = [start(program, log) for program, log in zip(programs, logs, strict=True)]
    began = time.monotonic()
    for program, log in zip(programs, logs, strict=True):
        while program == "hangs" and "ready" not in log.read_text():
            assert time.monotonic() - began < 60
            time.sleep(0.02)
    try:
        assert engine.wait_for(processes, 1) == problem
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for program, log in zip(programs, logs, strict=True):
        stuck = program == "hangs" and "fails" not in programs
        assert ("in stuck_here" in log.read_text()) == stuck


def test_a_process_that_cannot_serve_ends_the_run_with_the_logs_of_all(tmp_path: Path) -> None:
    job = engine.Job(str(tmp_path / "no-such-model"))
    with pytest.raises(AssertionError, match=r"(?s)ranks ended with \[.*rank 0:.*no-such-model"):
        engine.run([job], tmp_path)
