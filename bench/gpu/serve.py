"""`vllm bench throughput` on the whole Qwen3-30B-A3B configuration, random weights, equal flags."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import reference
from bench.shapes.published import SHAPES
from bench.shapes.random_model import _describe
from camera_serve.benchmark.commands import bench_throughput
from camera_serve.benchmark.settings import BenchSettings
from camera_serve.checkpoint.format import MARKER, MARKER_FILE
from camera_serve.checkpoint.writer import copy_side_files, write_json
from camera_serve.recipe import Calibration, Recipe, TierPlan

SHAPE = "qwen3-30b-a3b"
LAYERS, VOCABULARY = 48, 151936
PLANS = {"dense": None, "40% pruned": TierPlan.prune(0.4), "2.25 bits": TierPlan.mixed(2, 0.2)}
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256]
SETTINGS = BenchSettings(
    modes=("throughput",),
    input_len=256,
    output_len=256,
    num_prompts=512,
    vllm_flags=(
        *("--load-format", "dummy"),
        *("--max-num-seqs", str(CAPTURED[-1])),
        *("--gpu-memory-utilization", "0.9"),
        # Fewer graphs than by default: each takes seconds to capture.
        *("--compilation-config", f'{{"cudagraph_capture_sizes": {CAPTURED}}}'),
    ),
)


def measure(models: Sequence[str], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Output tokens per second of each of `PLANS` named; a new engine for each.

    Yields the result after each, `left` naming those that are to come. Raises `VllmError`.
    """
    result: dict[str, Any] = {
        "shape": SHAPE,
        "settings": SETTINGS.model_dump(mode="json"),
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="camera-gpu-") as folder:
        for number, name in enumerate(models):
            model = Path(folder) / f"model-{number}"
            write_skeleton(model, PLANS[name], layers=LAYERS, vocab=VOCABULARY, seed=seed)
            run = bench_throughput(model, name, SETTINGS)
            print(f"{name}: {run.output_tokens_per_second:.0f} output tokens/s", flush=True)
            result["runs"].append(run.model_dump(mode="json"))
            yield result | {"left": list(models[number + 1 :])}


def write_skeleton(
    folder: Path, plan: TierPlan | None, *, layers: int, vocab: int, seed: int
) -> None:
    """A model folder without weights, which `--load-format dummy` is enough for.

    Its tokenizer is the reference MoE's: prompts are drawn from fewer tokens than the model has.
    """
    recipe = None
    if plan:
        recipe = Recipe.paper(
            plan=plan, calibration=Calibration(source="none: energies were drawn")
        )
    model = _describe(SHAPES[SHAPE], layers, vocab, recipe, seed, False)
    folder.mkdir()
    copy_side_files(reference.MODEL, folder)
    config = model.config
    if model.quantization:
        write_json(folder / MARKER_FILE, MARKER)
        config = config | model.quantization.config_entries()
    write_json(folder / "config.json", config)


def table(result: dict[str, Any]) -> str:
    """Output tokens per second, and the ratio to the dense model's where that was measured."""
    speeds = {run["model"]: run["output_tokens_per_second"] for run in result["runs"]}
    dense = speeds.get("dense")
    return "\n".join(
        f"{name:>12}: {speed:8.0f} output tokens/s" + (f", {speed / dense:.2f}x" if dense else "")
        for name, speed in speeds.items()
    )
