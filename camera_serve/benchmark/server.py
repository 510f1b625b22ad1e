"""A real `vllm serve` for as long as a `with` block lasts."""

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from camera_serve.benchmark.process import VllmError, running, tail

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Server:
    """A healthy `vllm serve`: `url` ends in `/v1` and is the openai client's `base_url`."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def require_alive(self) -> None:
        """Raise `VllmError` when the server has ended."""
        if self.process.poll() is not None:
            code = self.process.returncode
            raise VllmError(f"vllm serve ended with code {code}", tail(self.log))


@contextmanager
def served(
    model: Path, *flags: str, env: Mapping[str, str] | None = None, timeout: float = 1200
) -> Iterator[Server]:
    """Run `vllm serve MODEL FLAGS` on a free port of this machine.

    The model's name there is the path, unless `flags` say otherwise. Nothing of it is left when
    the block ends. Raises `VllmError` when the server dies or is not healthy within `timeout`
    seconds.
    """
    port = _free_port()
    where = ("--host", "127.0.0.1", "--port", str(port))
    with (
        tempfile.NamedTemporaryFile(prefix="vllm-serve-") as file,
        running("serve", str(model), *where, *flags, log=Path(file.name), env=env) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}/v1", port, process, Path(file.name))
        _wait_until_healthy(server, timeout)
        yield server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not _is_healthy(server.port):
        server.require_alive()
        if time.monotonic() > deadline:
            raise VllmError(f"vllm serve not healthy after {timeout:.0f} s", tail(server.log))
        time.sleep(POLL_SECONDS)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
