import os
import time
import urllib.request
from pathlib import Path

import pytest

from camera_serve.benchmark.process import VllmError
from camera_serve.benchmark.server import served
from tests.benchmark import fake_vllm

HEALTHY = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2] + "/child", "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["MARK"].encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_server_and_its_children_end_with_the_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch, tmp_path, HEALTHY)
    with pytest.raises(ZeroDivisionError), served(tmp_path, env={"MARK": "ours"}) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/v1"
        assert urllib.request.urlopen(server.url).read() == b"ours"
        child = int((tmp_path / "child").read_text())
        os.kill(child, 0)
        raise ZeroDivisionError
    deadline = time.monotonic() + 5
    while fake_vllm.is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not fake_vllm.is_alive(child)


def test_dead_server_shows_its_code_and_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch, tmp_path, "raise SystemExit('weight gone')")
    with pytest.raises(VllmError, match=r"code 1:\nweight gone"), served(tmp_path):
        pass


def test_server_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch, tmp_path, "import time; time.sleep(600)")
    with pytest.raises(VllmError, match="not healthy after 1 s"), served(tmp_path, timeout=1):
        pass
