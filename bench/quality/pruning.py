"""Held-out perplexity of CAMERA-P against random removal and removal by weight norm alone.

    python -m bench.quality.pruning [--model FOLDER] [--fractions 0.2 0.4 0.6]
    python -m bench.quality.pruning --docs

The first measures and writes `bench/results/`; the second only puts the stored table in
docs/quality.md.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from transformers import PreTrainedModel

from bench import reference
from bench.quality.removal import random_scores, removed, weight_norms
from bench.stored import DOCS, environment, put_in_page, stored
from camera_serve import compress
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.evaluation.perplexity import WINDOW, Score, likelihood, load_model, windows_of
from camera_serve.recipe import Calibration, Recipe, TierPlan

RESULTS = reference.ROOT / "bench" / "results" / "quality-reference-moe.json"
RESULT_VERSION = 1
FRACTIONS = (0.2, 0.4, 0.6)
SEEDS = (0, 1, 2)

Windows = dict[str, list[torch.Tensor]]
Scores = dict[str, Score]


@dataclass(frozen=True)
class Bench:
    """The dense model, its texts and its scores, against which everything is measured."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    windows: Windows
    dense: Scores


def main() -> int:
    """Measure and store, or render what is stored."""
    options = _parse_options()
    if not options.docs:
        torch.set_num_threads(options.threads)
        calibration = Calibration(source=str(reference.CALIBRATION), samples=options.samples)
        plans = [TierPlan.prune(fraction) for fraction in options.fractions]
        recipes = [Recipe.paper(plan=plan, calibration=calibration) for plan in plans]
        result = measure(options.model, recipes)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = render(stored(options.output, RESULT_VERSION))
    Console().print(Markdown(table))
    if options.docs:
        put_in_page(DOCS / "quality.md", "quality", table)
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.pruning")
    parser.add_argument("--model", type=Path, default=reference.MODEL)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, metavar="LAMBDA")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only rewrite the table of docs/")
    return parser.parse_args()


def measure(model: Path, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Every method at the λ of every recipe on every held-out text, as JSON values."""
    windows = {name: windows_of(model, text) for name, text in reference.HELDOUT.items()}
    dense = load_model(model)
    bench = Bench(Checkpoint.open(model), dense, windows, _score_all(dense, windows))
    rows = [_row("dense", 0.0, name, found, bench) for name, found in bench.dense.items()]
    for recipe in recipes:
        rows += _measure_recipe(bench, recipe)
    return {
        "version": RESULT_VERSION,
        "environment": environment(),
        "model": _relative(model),
        "recipe": _settings(recipes[0]),
        "window": WINDOW,
        "tokens": {name: int(found.tokens.sum()) for name, found in bench.dense.items()},
        "weight_norm": "|w_gate| * |w_up| * |w_down|",
        "rows": rows,
    }


def _measure_recipe(bench: Bench, recipe: Recipe) -> Iterator[dict[str, Any]]:
    fraction = recipe.plan.pruned if recipe.plan else 0.0
    _say(f"λ = {fraction:.0%}, camera-p")
    with tempfile.TemporaryDirectory(prefix="camera-quality-") as folder:
        output = Path(folder) / "compressed"
        compress(model=bench.checkpoint.path, output=output, recipe=recipe)
        compressed = Checkpoint.open(output)
        camera = _score_all(load_model(output), bench.windows)
    removed_share = 1 - compressed.expert_bytes / bench.checkpoint.expert_bytes
    for name, found in camera.items():
        row = _row("camera-p", fraction, name, found, bench)
        yield {**row, "expert_bytes_removed": removed_share}
    for method, seed, scores in _baselines(bench, _removed_counts(compressed)):
        _say(f"λ = {fraction:.0%}, {method}" + ("" if seed is None else f", seed {seed}"))
        for name, found in scores.items():
            row = _row(method, fraction, name, found, bench)
            mean, error = found.difference(camera[name])
            yield {
                **row,
                "seed": seed,
                "log_ratio_to_camera_p": mean,
                "log_ratio_to_camera_p_se": error,
            }


def _removed_counts(compressed: Checkpoint) -> list[int]:
    """Micro-experts CAMERA-P removed from each MoE layer: the baselines remove as many."""
    structure, quantization = compressed.structure, compressed.quantization
    assert quantization is not None
    layouts = [quantization.layout(structure.moe_prefix(i)) for i in structure.moe_layers]
    kept = [sum(layout.expert_d_ff) + sum(layout.shared_d_ff) for layout in layouts]
    return [structure.micro_experts_per_layer - count for count in kept]


def _baselines(bench: Bench, counts: list[int]) -> Iterator[tuple[str, int | None, Scores]]:
    structure = bench.checkpoint.structure
    with removed(bench.model, structure, weight_norms(bench.model, structure), counts):
        yield "weight-norm", None, _score_all(bench.model, bench.windows)
    for seed in SEEDS:
        with removed(bench.model, structure, random_scores(structure, seed), counts):
            yield "random", seed, _score_all(bench.model, bench.windows)


def _score_all(model: PreTrainedModel, windows: Windows) -> Scores:
    return {name: likelihood(model, found) for name, found in windows.items()}


def _row(method: str, fraction: float, text: str, found: Score, bench: Bench) -> dict[str, Any]:
    mean, error = found.difference(bench.dense[text])
    return {
        "method": method,
        "fraction": fraction,
        "text": text,
        "perplexity": math.exp(found.mean),
        "log_ratio_to_dense": mean,
        "log_ratio_to_dense_se": error,
    }


def render(result: dict[str, Any]) -> str:
    """The stored figures as a Markdown table, one line per text and λ."""
    lines = [
        "| held-out text | λ | CAMERA-P | weight norm alone | at random, 3 seeds |",
        "|---|---|---|---|---|",
    ]
    for text in result["tokens"]:
        rows = [row for row in result["rows"] if row["text"] == text]
        dense = rows[0]["perplexity"]
        lines.append(f"| {text} | 0% (dense) | {dense:.2f} | {dense:.2f} | {dense:.2f} |")
        for fraction in sorted({row["fraction"] for row in rows[1:]}):
            cells = [
                _cell([r for r in rows if r["fraction"] == fraction and r["method"] == method])
                for method in ("camera-p", "weight-norm", "random")
            ]
            lines.append(f"| {text} | {fraction:.0%} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(result)])


def _cell(rows: list[dict[str, Any]]) -> str:
    perplexity = statistics.mean(row["perplexity"] for row in rows)
    if len(rows) > 1:
        spread = [row["perplexity"] for row in rows]
        return f"{perplexity:.2f} ({min(spread):.2f} to {max(spread):.2f})"
    # The log of a ratio near 1 is the relative change; its error carries over unchanged.
    change = math.expm1(rows[0]["log_ratio_to_dense"])
    return f"{perplexity:.2f} ({change:+.1%} ± {rows[0]['log_ratio_to_dense_se']:.1%})"


def _caption(result: dict[str, Any]) -> str:
    tokens = ", ".join(f"{count:,} tokens of {name}" for name, count in result["tokens"].items())
    found = result["environment"]
    return (
        f"Perplexity of `{result['model']}` ({tokens}; windows of {result['window']}); in brackets "
        "the change against dense with its paired standard error, or the range over seeds. "
        f"Weight norm is `{result['weight_norm']}`. {found['cpu']}, torch {found['torch']}, "
        f"transformers {found['transformers']}, commit {found['commit']}."
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What all recipes share, without this machine's paths."""
    settings = recipe.model_dump(mode="json", exclude={"plan"})
    settings["calibration"]["source"] = _relative(Path(recipe.calibration.name))
    return settings


def _relative(path: Path) -> str:
    path = path.resolve()
    inside = path.is_relative_to(reference.ROOT)
    return str(path.relative_to(reference.ROOT)) if inside else path.name


def _say(what: str) -> None:
    print(f"quality: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
