"""`vllm bench serve`, `throughput` and `latency`: run to the end, and their JSON as figures."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camera_serve.benchmark.process import VllmError, running, tail
from camera_serve.benchmark.report import (
    Drafts,
    LatencyRun,
    ServingRun,
    ThroughputRun,
    Times,
)
from camera_serve.benchmark.server import POLL_SECONDS, Server
from camera_serve.benchmark.settings import BenchSettings, Load

WARM_UPS = 3
LATENCY_ITERATIONS = 8
RESULT = "result.json"


def bench_serve(
    server: Server, model: Path, name: str, load: Load, repeat: int, settings: BenchSettings
) -> ServingRun:
    """Ask a server as one load says, after warm-up requests of the same kind.

    Raises `VllmError` when the server dies, or leaves a request unanswered.
    """
    prompts = settings.prompts_of(load)
    flags = [
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(server.port)),
        *_random_prompts(settings, prompts),
        *("--num-warmups", str(max(WARM_UPS, load.concurrency or 0)), "--ignore-eos"),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
        *_load_flags(load),
    ]
    with tempfile.TemporaryDirectory(prefix="vllm-bench-") as folder:
        save = ("--save-result", "--result-dir", folder, "--result-filename", RESULT)
        found = _finish("serve", [*flags, *save], Path(folder), settings, server)
    if found["completed"] != prompts:
        answered = f"{found['completed']} of {prompts} requests under {load.name}"
        raise VllmError(f"vllm serve answered {answered}", tail(server.log))
    return ServingRun(
        model=name,
        repeat=repeat,
        load=load,
        requests=prompts,
        seconds=found["duration"],
        output_tokens_per_second=found["output_throughput"],
        total_tokens_per_second=found["total_token_throughput"],
        ttft_ms=_times(found, "ttft"),
        tpot_ms=_times(found, "tpot"),
        drafts=_drafts(found),
    )


def bench_throughput(model: Path, name: str, settings: BenchSettings) -> ThroughputRun:
    """Answer as many prompts as the largest load has, all at once."""
    prompts = max(settings.prompts_of(load) for load in settings.loads)
    flags = [
        *("--model", str(model), *_random_prompts(settings, prompts)),
        *("--num-warmups", str(WARM_UPS)),
    ]
    with tempfile.TemporaryDirectory(prefix="vllm-bench-") as folder:
        save = ("--output-json", str(Path(folder) / RESULT), *settings.engine_flags)
        found = _finish("throughput", [*flags, *save], Path(folder), settings)
    return ThroughputRun(
        model=name,
        requests=found["num_requests"],
        seconds=found["elapsed_time"],
        output_tokens_per_second=found["requests_per_second"] * settings.output_len,
    )


def bench_latency(model: Path, name: str, settings: BenchSettings) -> LatencyRun:
    """Answer one prompt at a time."""
    lengths = ("--input-len", str(settings.input_len), "--output-len", str(settings.output_len))
    rounds = ("--num-iters-warmup", str(WARM_UPS), "--num-iters", str(LATENCY_ITERATIONS))
    flags = ["--model", str(model), *lengths, "--batch-size", "1", *rounds]
    with tempfile.TemporaryDirectory(prefix="vllm-bench-") as folder:
        save = ("--output-json", str(Path(folder) / RESULT), *settings.engine_flags)
        found = _finish("latency", [*flags, *save], Path(folder), settings)
    median = found["percentiles"]["50"]
    return LatencyRun(model=name, mean_seconds=found["avg_latency"], median_seconds=median)


def _random_prompts(settings: BenchSettings, count: int) -> list[str]:
    flags = {
        "--dataset-name": "random",
        "--random-input-len": settings.input_len,
        "--random-output-len": settings.output_len,
        "--num-prompts": count,
        "--seed": settings.seed,
    }
    return [str(part) for flag in flags.items() for part in flag]


def _load_flags(load: Load) -> tuple[str, ...]:
    if load.concurrency:
        return ("--max-concurrency", str(load.concurrency))
    return ("--request-rate", str(load.request_rate))


class _Found(dict[str, Any]):
    """A result of `vllm bench`; a figure that is not there is an error that names it."""

    def __missing__(self, key: str) -> Any:
        raise VllmError(f"vllm bench wrote no {key!r} but {', '.join(self)}: is it too old or new?")


def _finish(
    mode: str,
    flags: list[str],
    folder: Path,
    settings: BenchSettings,
    server: Server | None = None,
) -> Mapping[str, Any]:
    """Run one `vllm bench` to its end; raises `VllmError` when it, or the server, fails."""
    log = folder / "log"
    with running("bench", mode, *flags, log=log, env=settings.environment) as process:
        while process.poll() is None:
            if server:
                server.require_alive()
            time.sleep(POLL_SECONDS)
    if process.returncode or not (folder / RESULT).exists():
        if server:
            server.require_alive()
        raise VllmError(f"vllm bench {mode} ended with code {process.returncode}", tail(log))
    return _Found(json.loads((folder / RESULT).read_text()))


def _drafts(found: Mapping[str, Any]) -> Drafts | None:
    """What the server's /metrics counted during the load, by vLLM's account of it."""
    if "spec_decode_draft_tokens" not in found:
        return None
    tokens, accepted = (found[f"spec_decode_{name}_tokens"] for name in ("draft", "accepted"))
    return Drafts(tokens=tokens, accepted=accepted)


def _times(found: Mapping[str, Any], name: str) -> Times:
    mean, middle, high = (found[f"{which}_{name}_ms"] for which in ("mean", "median", "p99"))
    return Times(mean=mean, median=middle, p99=high)
