"""bench(): every model in turn behind a real server, and again in the opposite order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camera_serve.benchmark import process
from camera_serve.benchmark.commands import bench_latency, bench_serve, bench_throughput
from camera_serve.benchmark.environment import Environment
from camera_serve.benchmark.memory import model_bytes, peak_resident_bytes, resident_bytes
from camera_serve.benchmark.report import (
    BenchedModel,
    BenchReport,
    LatencyRun,
    ServerMemory,
    ServingRun,
    ThroughputRun,
)
from camera_serve.benchmark.server import Server, served
from camera_serve.benchmark.settings import BenchSettings
from camera_serve.checkpoint.format import CameraQuantizationConfig
from camera_serve.checkpoint.hub import origin_of, resolve
from camera_serve.checkpoint.reader import read_json
from camera_serve.errors import CheckpointError

LATENCY_VOCABULARY = 10000

OnStep = Callable[[str], None]


def bench(
    models: Sequence[str | Path], settings: BenchSettings, *, on_step: OnStep = lambda step: None
) -> BenchReport:
    """Serve and measure each model; figures are to be compared with the first one's.

    models: local folders or hub names, usually the original first. They take turns, A B C C B A
    and so on, so that a machine that slowly gets faster or slower favours none of them. Raises
    `CameraError` subclasses before anything runs where it can.
    """
    paths = [resolve(str(model)) for model in models]
    described = _describe([str(model) for model in models], paths)
    settings.check_machine()
    if "latency" in settings.modes:
        _check_vocabularies(paths)
    process.vllm_command()
    runs = _Runs(settings, on_step)
    for repeat, which in _turns(len(paths), settings.repeats):
        on_step(f"repeat {repeat + 1} of {settings.repeats}: {described[which].name}")
        runs.visit(paths[which], described[which].name, repeat)
    return BenchReport(
        settings=settings,
        environment=Environment.here(process.environment(settings.environment)),
        models=described,
        serving=tuple(runs.serving),
        memory=tuple(runs.memory),
        throughput=tuple(runs.throughput),
        latency=tuple(runs.latency),
    )


def _check_vocabularies(paths: list[Path]) -> None:
    for path in paths:
        size = _vocabulary(read_json(path / "config.json"))
        if size < LATENCY_VOCABULARY:
            raise process.VllmError(
                f"vllm bench latency draws token ids below {LATENCY_VOCABULARY}, and {path} has "
                f"{size} tokens: leave latency out of --modes"
            )


def _vocabulary(config: dict[str, Any]) -> int:
    """Tokens of a model, as config.json says at its top or of its text part."""
    text = config.get("text_config", {})
    size = config.get("vocab_size", text.get("vocab_size", LATENCY_VOCABULARY))
    return int(size)


def _turns(count: int, repeats: int) -> Iterator[tuple[int, int]]:
    for repeat in range(repeats):
        models = range(count)
        for which in models if repeat % 2 == 0 else reversed(models):
            yield repeat, which


@dataclass
class _Runs:
    """The figures of every run so far, and how to add those of one more visit to a model."""

    settings: BenchSettings
    on_step: OnStep
    serving: list[ServingRun] = field(default_factory=list)
    memory: list[ServerMemory] = field(default_factory=list)
    throughput: list[ThroughputRun] = field(default_factory=list)
    latency: list[LatencyRun] = field(default_factory=list)

    def visit(self, path: Path, name: str, repeat: int) -> None:
        """Serve a model and measure it in every mode."""
        modes = self.settings.modes
        if "serve" in modes:
            self.on_step("  vllm serve")
            with served(path, *self.settings.engine_flags, env=self.settings.environment) as server:
                self._ask(server, path, name, repeat)
        if "throughput" in modes:
            self.on_step("  vllm bench throughput")
            self.throughput.append(bench_throughput(path, name, self.settings))
        if "latency" in modes:
            self.on_step("  vllm bench latency")
            self.latency.append(bench_latency(path, name, self.settings))

    def _ask(self, server: Server, path: Path, name: str, repeat: int) -> None:
        for load in self.settings.loads:
            run = bench_serve(server, path, name, load, repeat, self.settings)
            self.serving.append(run)
            speed = f"{run.output_tokens_per_second:.1f} output tokens/s"
            if run.drafts:
                speed += f", {run.drafts.accepted_share:.0%} of drafts accepted"
            self.on_step(f"  vllm bench serve, {load.name}: {speed}")
        memory = ServerMemory(
            model=name,
            repeat=repeat,
            resident_bytes=resident_bytes(server.process.pid),
            peak_resident_bytes=peak_resident_bytes(server.process.pid),
            model_bytes=model_bytes(server.log.read_text(errors="replace")),
        )
        self.memory.append(memory)


def _describe(models: list[str], paths: list[Path]) -> tuple[BenchedModel, ...]:
    described: list[BenchedModel] = []
    names: list[str] = []
    for model, path in zip(models, paths, strict=True):
        plan, weights = _plan(path), [file.stat().st_size for file in path.glob("*.safetensors")]
        if not weights:
            raise CheckpointError(f"{path} holds no safetensors file: download its weights")
        names.append(origin_of(path).name if Path(model).is_dir() else model)
        # Folders of one name, or one model twice to see the noise.
        count = names.count(names[-1])
        name = f"{names[-1]} ({count})" if count > 1 else names[-1]
        described.append(BenchedModel(name=name, plan=plan, weight_bytes=sum(weights)))
    return tuple(described)


def _plan(path: Path) -> str | None:
    quantization = read_json(path / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "camera":
        return None
    return CameraQuantizationConfig.parse(quantization).recipe.goal
