"""A server that answers huggingface_hub's client as the hub does; a folder is its one model."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

MODEL = "someone/tiny-moe"
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40}
"""All revisions hold the same files."""

TOKEN = "hf_right"


@dataclass
class Hub:
    """What the hub has, how it behaves, and what it was asked.

    gated: files are given to `TOKEN` alone. status: what every request is answered with, when set.
    cuts: by file, how often the connection breaks in its middle. asked: (method, path, Range).
    """

    files: dict[str, bytes]
    gated: bool = False
    status: int = 0
    cuts: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    endpoint: str = ""

    def downloads(self) -> list[tuple[str, str]]:
        """Files that were sent, in order, and the range that was asked for."""
        got = [(path, part) for method, path, part in self.asked if method == "GET"]
        return [(path.rpartition("/")[2], part) for path, part in got if "/resolve/" in path]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process whose hub this is, with its cache below `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **more}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve the files of a folder as `MODEL`."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    hub = Hub(files)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def download(
    hub: Hub, home: Path, model: str = MODEL, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Resolve MODEL in a process of its own, after the Python `before`.

    stdout is its folder, or stderr ends with why there is none.
    """
    script = (
        f"import sys\n{before}\n"
        "from camera_serve.checkpoint.hub import resolve\n"
        "from camera_serve.errors import CheckpointError\n"
        "try: print(resolve(sys.argv[1]))\n"
        "except CheckpointError as error: sys.exit(f'error: {error}')"
    )
    command = [sys.executable, "-c", script, model]
    environment = hub.environment(home, **env)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *words: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.state, urlsplit(self.path).path
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.status:
            return self._refuse(hub.status, "", "out of order")
        if token not in ("", TOKEN):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if not path.removeprefix("/api/models").startswith(f"/{MODEL}"):
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if found := re.fullmatch(rf"/api/models/{MODEL}/revision/([^/]+)", path):
            return self._describe(unquote(found[1]))
        if re.fullmatch(rf"/api/models/{MODEL}/tree/[0-9a-f]+", path):
            return self._json([_entry(name, data) for name, data in hub.files.items()])
        if found := re.fullmatch(rf"/{MODEL}/resolve/([0-9a-f]+)/(.+)", path):
            if hub.gated and token != TOKEN:
                return self._refuse(401 if not token else 403, "GatedRepo", "Access is restricted")
            return self._file(found[1], unquote(found[2]))
        return self._refuse(404, "EntryNotFound", "Entry not found")

    def _describe(self, revision: str) -> None:
        known = COMMITS | {commit: commit for commit in COMMITS.values()}
        if revision not in known:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        names = [{"rfilename": name} for name in self.state.files]
        self._json({"id": MODEL, "sha": known[revision], "siblings": names, "private": False})

    def _file(self, commit: str, name: str) -> None:
        data = self.state.files[name]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        self.send_response(206 if found else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - start))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.state.cuts.get(name, 0) > 0:
            self.state.cuts[name] -= 1
            # Nothing new after the first cut, or the client would never give up.
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data[start:])

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(data).hexdigest()
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry
