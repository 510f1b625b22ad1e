"""`vllm bench throughput` on the whole Qwen3-30B-A3B configuration, random weights, equal flags."""

import tempfile
from pathlib import Path
from typing import Any

from bench import reference
from bench.random_model import _describe
from bench.shapes import SHAPES
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


def measure(*, seed: int = 0) -> dict[str, Any]:
    """Output tokens per second of each model; a new engine for each, dense first."""
    with tempfile.TemporaryDirectory(prefix="camera-gpu-") as folder:
        runs = []
        for number, (name, plan) in enumerate(PLANS.items()):
            model = Path(folder) / f"model-{number}"
            write_skeleton(model, plan, layers=LAYERS, vocab=VOCABULARY, seed=seed)
            runs.append(bench_throughput(model, name, SETTINGS))
            print(f"{name}: {runs[-1].output_tokens_per_second:.0f} output tokens/s", flush=True)
    return {
        "shape": SHAPE,
        "settings": SETTINGS.model_dump(mode="json"),
        "runs": [run.model_dump(mode="json") for run in runs],
    }


def write_skeleton(
    folder: Path, plan: TierPlan | None, *, layers: int, vocab: int, seed: int
) -> None:
    """A model folder without weights, which `--load-format dummy` is enough for.

    Its tokenizer is the reference MoE's: prompts are drawn from fewer tokens than the model has.
    """
    recipe = None
    if plan:
        recipe = Recipe(plan=plan, calibration=Calibration(source="none: energies were drawn"))
    model = _describe(SHAPES[SHAPE], layers, vocab, recipe, seed, False)
    folder.mkdir()
    copy_side_files(reference.MODEL, folder)
    config = model.config
    if model.quantization:
        write_json(folder / MARKER_FILE, MARKER)
        config = config | {"quantization_config": model.quantization.model_dump(mode="json")}
    write_json(folder / "config.json", config)


def table(result: dict[str, Any]) -> str:
    """Output tokens per second, and the ratio to the dense model's."""
    dense = result["runs"][0]["output_tokens_per_second"]
    return "\n".join(
        f"{run['model']:>12}: {run['output_tokens_per_second']:8.0f} output tokens/s, "
        f"{run['output_tokens_per_second'] / dense:.2f}x"
        for run in result["runs"]
    )
