"""What a benchmark measures: loads, lengths, repeats, and the flags every model is served with."""

import os
from typing import Annotated, Literal

from pydantic import Field

from camera_serve.benchmark.process import VllmError
from camera_serve.recipe import Settings

Mode = Literal["serve", "throughput", "latency"]
MODES: tuple[Mode, ...] = ("serve", "throughput", "latency")

LEAST_PROMPTS = 8
PROMPTS_PER_STREAM = 4
SECONDS_AT_RATE = 30

Positive = Annotated[int, Field(gt=0)]


class Load(Settings):
    """Requests sent to a server: so many at once, or so many per second at random times."""

    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def name(self) -> str:
        """`16 at once` or `2.5/s`."""
        return f"{self.concurrency} at once" if self.concurrency else f"{self.request_rate:g}/s"


class BenchSettings(Settings):
    """Settings of one benchmark; `vllm_flags` go to every server and engine.

    Lengths are tokens of each prompt and answer. `num_prompts` None: enough for a few answers in
    every stream, or for half a minute at a request rate.
    """

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = MODES
    concurrencies: tuple[Positive, ...] = (1, 16)
    request_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    input_len: Positive = 128
    output_len: Annotated[int, Field(gt=1)] = 64
    num_prompts: Positive | None = None
    repeats: Positive = 2
    threads: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    vllm_flags: tuple[str, ...] = ()

    @property
    def loads(self) -> tuple[Load, ...]:
        """Every load a server gets, concurrencies first."""
        at_once = [Load(concurrency=count) for count in self.concurrencies]
        return (*at_once, *(Load(request_rate=rate) for rate in self.request_rates))

    @property
    def engine_flags(self) -> tuple[str, ...]:
        """Flags of `vllm serve`, `vllm bench throughput` and `vllm bench latency`.

        Without prefix caching, or warm-up requests would answer later ones. What the user gives
        comes last and wins.
        """
        # Some tokenizers add tokens of their own to a prompt.
        longest = self.input_len + self.output_len + 64
        ours = ("--max-model-len", str(longest), "--no-enable-prefix-caching")
        return (*ours, *self.vllm_flags)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every vLLM process: the first cores this one may use."""
        if self.threads is None:
            return {}
        bound = sorted(os.sched_getaffinity(0))[: self.threads]
        return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound))}

    def check_machine(self) -> None:
        """Raise `VllmError` when this machine has too few cores."""
        cores = len(os.sched_getaffinity(0))
        if self.threads and self.threads > cores:
            raise VllmError(f"--threads {self.threads}: this process may use {cores} cores")

    def prompts_of(self, load: Load) -> int:
        """How many requests a load sends."""
        if self.num_prompts:
            return self.num_prompts
        if load.concurrency:
            return max(LEAST_PROMPTS, PROMPTS_PER_STREAM * load.concurrency)
        assert load.request_rate
        return max(LEAST_PROMPTS, round(SECONDS_AT_RATE * load.request_rate))
