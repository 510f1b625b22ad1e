"""What a benchmark found, as one versioned JSON, and the medians and ratios people read."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from camera_serve.benchmark.environment import Environment
from camera_serve.benchmark.settings import BenchSettings, Load
from camera_serve.checkpoint.writer import write_json
from camera_serve.recipe import Settings


class BenchedModel(Settings):
    """A model of the benchmark; `plan` is its tier plan, None when camera-serve did not make it."""

    name: str
    plan: str | None
    weight_bytes: int


class Times(Settings):
    """Milliseconds over the requests of one run."""

    mean: float
    median: float
    p99: float


class Drafts(Settings):
    """Tokens that speculative decoding guessed, and how many of them the model took over."""

    tokens: int
    accepted: int

    @property
    def accepted_share(self) -> float:
        """Accepted tokens per guessed one."""
        return self.accepted / self.tokens


class ServingRun(Settings):
    """One `vllm bench serve`. TTFT: time to the first token; TPOT: per token after it.

    `drafts` is None where the server guessed nothing.
    """

    model: str
    repeat: int
    load: Load
    requests: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft_ms: Times
    tpot_ms: Times
    drafts: Drafts | None = None


class ServerMemory(Settings):
    """Memory of one server's processes after its loads, and of the model by vLLM's own account.

    `peak_resident_bytes` includes loading. None: the system, or vLLM, does not say.
    """

    model: str
    repeat: int
    resident_bytes: int | None
    peak_resident_bytes: int | None
    model_bytes: int | None


class ThroughputRun(Settings):
    """One `vllm bench throughput`: all prompts at once, without a server."""

    model: str
    requests: int
    seconds: float
    output_tokens_per_second: float


class LatencyRun(Settings):
    """One `vllm bench latency`: seconds from one prompt to its whole answer."""

    model: str
    mean_seconds: float
    median_seconds: float


class BenchReport(Settings):
    """A whole benchmark; the first model is what the others are compared with."""

    version: Literal[1] = 1
    settings: BenchSettings
    environment: Environment
    models: tuple[BenchedModel, ...]
    serving: tuple[ServingRun, ...] = ()
    memory: tuple[ServerMemory, ...] = ()
    throughput: tuple[ThroughputRun, ...] = ()
    latency: tuple[LatencyRun, ...] = ()

    def write(self, path: Path) -> None:
        """Write the report as JSON; the file appears whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    def runs(self, model: str, load: Load) -> list[ServingRun]:
        """The runs of one model under one load, one per repeat."""
        return [run for run in self.serving if (run.model, run.load) == (model, load)]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
