"""A real `vllm serve` for as long as a `with` block lasts."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

SERVER_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
LOG_TAIL_LINES = 60
STOP_SECONDS = 20


class ServerError(RuntimeError):
    """`vllm serve` died or never became healthy; the message ends with the tail of its log."""


@contextmanager
def served(
    model: Path, *flags: str, env: Mapping[str, str] | None = None, timeout: float = 1200
) -> Iterator[str]:
    """Run `vllm serve MODEL FLAGS` on a free port; yields the `base_url` the openai client takes.

    The URL ends in `/v1`. The model's name there is the path, unless `flags` say otherwise. The
    whole process group is gone when the block ends, also after an error or a SIGTERM. Raises
    `ServerError` when the server dies or is not healthy within `timeout` seconds.
    """
    port = _free_port()
    command = [_vllm(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-serve-") as log, sigterm_as_exit():
        process = subprocess.Popen(
            command,
            env={**os.environ, **SERVER_ENV, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, port, Path(log.name), timeout)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop_group(process)


def _vllm() -> str:
    """The `vllm` command of this Python's environment, whatever PATH says."""
    return str(Path(sys.executable).parent / "vllm")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Path, timeout: float
) -> None:
    deadline = time.monotonic() + timeout
    while not _is_healthy(port):
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with code {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve not healthy after {timeout:.0f} s:\n{_tail(log)}")
        time.sleep(0.5)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    # The group outlives its leader when an engine process hangs: signal it, not the leader alone.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that `finally` blocks run when a CI job is cancelled."""
    try:
        previous = signal.signal(signal.SIGTERM, _exit)
    except ValueError:
        # Not in the main thread, which is the only one that may set handlers.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
