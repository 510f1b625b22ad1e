"""A `vllm` command that loads in no time: it writes down its calls and answers as vLLM does.

A model's folder may say how it behaves, in `fake.json`: `{"speed": 40}`, and how it goes wrong:
`{"fail": "bench serve", …}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from camera_serve.benchmark import process

SOURCE = r"""
import http.server, json, os, sys, threading, time
from pathlib import Path

arguments, here = sys.argv[1:], Path(__file__).parent
mode = " ".join(arguments[: 2 if arguments[0] == "bench" else 1])

def flag(name):
    return arguments[arguments.index(name) + 1]

folder = Path(arguments[1] if mode == "serve" else flag("--model"))
told = folder / "fake.json"
fake = json.loads(told.read_text()) if told.exists() else {"speed": 10}
names = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")
call = {"mode": mode, "model": folder.name, "arguments": arguments}
call["environment"] = {name: os.environ[name] for name in names if name in os.environ}
call["pid"] = os.getpid()
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(call) + "\n")

if fake.get("fail") == mode:
    sys.exit("weight gone")
if fake.get("hang") == mode:
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass

if mode == "serve":
    print("Model loading took 1.5 GiB memory and 2.000000 seconds", flush=True)
    if fake.get("fail") == "under load":
        def die():
            while "bench serve" not in (here / "calls.jsonl").read_text():
                time.sleep(0.02)
            print("engine gone", flush=True)
            os._exit(7)
        threading.Thread(target=die).start()
    http.server.HTTPServer(("127.0.0.1", int(flag("--port"))), Handler).serve_forever()

if mode == "bench serve" and fake.get("fail") == "under load":
    time.sleep(600)
speed = fake["speed"]
if mode == "bench serve":
    at_once = int(flag("--max-concurrency")) if "--max-concurrency" in arguments else 2
    asked = int(flag("--num-prompts"))
    delays = {"mean_ttft_ms": 30.0, "median_ttft_ms": 1000 / speed, "p99_ttft_ms": 90.0}
    delays |= {"mean_tpot_ms": 3.0, "median_tpot_ms": 100 / speed, "p99_tpot_ms": 9.0}
    result = {
        "completed": asked - fake.get("unanswered", 0),
        "duration": 2.0,
        "output_throughput": speed * at_once,
        "total_token_throughput": 3 * speed * at_once,
        **delays,
    }
    if "accepted" in fake:
        result |= {"spec_decode_draft_tokens": 30, "spec_decode_accepted_tokens": fake["accepted"]}
    output = Path(flag("--result-dir")) / flag("--result-filename")
elif mode == "bench throughput":
    result = {"num_requests": int(flag("--num-prompts")), "elapsed_time": 4.0}
    result |= {"requests_per_second": speed / 10, "tokens_per_second": 0.0}
    output = Path(flag("--output-json"))
else:
    result = {"avg_latency": 60 / speed, "percentiles": {"10": 1.0, "50": 50 / speed}}
    output = Path(flag("--output-json"))
for name in fake.get("forget", []):
    del result[name]
output.write_text(json.dumps(result))
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str = SOURCE) -> Path:
    """Put the command in `folder` and let it be found."""
    command = folder / "vllm"
    command.write_text(f"#!{sys.executable} -IS\n{source}")
    command.chmod(0o755)
    monkeypatch.setattr(process, "vllm_command", lambda: str(command))
    return command


def model(folder: Path, *, vocab_size: int = 20000, nested: bool = False, **behaviour: Any) -> Path:
    """A folder that looks like a model to the benchmark; it tells the fake how to behave.

    nested: whether its settings are those of the text part of a model that sees pictures.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    (folder / "fake.json").write_text(json.dumps(behaviour))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def calls(command: Path) -> list[dict[str, Any]]:
    """What the command was asked, in order."""
    file = command.with_name("calls.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
