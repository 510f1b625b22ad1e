"""What CAMERA-Q costs on held-out text, against its ablations at equal bits, on the reference MoE.

    python -m bench.quality.quantization
    python -m bench.quality.quantization --docs

Figure 8 of the paper (the share r of the outer tiers), CAMERA-Q†, single-precision GPTQ, the other
grouping of down_proj, and pruning and quantizing in one pass. The first measures and writes
`bench/results/`; the second only puts the stored table in docs/quality.md.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from camera_serve.converters.dense import convert_to_dense
from rich.console import Console
from rich.table import Table

from bench import reference
from bench.quality.ablations import ablated, down_along_micro_experts, sliced_by_input
from bench.stored import DOCS, environment, put_in_page, stored
from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.evaluation.perplexity import Cost, costs, load_model, windows_of

RESULTS = reference.ROOT / "bench" / "results" / "quantization-reference-moe.json"
RESULT_VERSION = 2
BASE = "CAMERA-Q, r = 0.2"
PLANS = {
    **{f"CAMERA-Q, r = {r:g}": str(TierPlan.mixed(2, r)) for r in (0.1, 0.2, 0.3, 0.4, 0.5)},
    "GPTQ, 2 bits throughout": "2:1",
    "GPTQ, 3 bits throughout": "3:1",
    "pruned by 10% and quantized": "3:0.225,2:0.675,0:0.1",
    "pruned by 20% and quantized": "4:0.1,3:0.25,2:0.45,0:0.2",
    "pruned by 40% and quantized": "4:0.3,3:0.3,0:0.4",
    "pruned only, to the same bytes": "16:0.140625,0:0.859375",
}


Costs = dict[str, Cost]


def main() -> None:
    """Measure every method, print the table and store it."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.quantization")
    parser.add_argument("--model", type=Path, default=reference.MODEL)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only put the stored table there")
    options = parser.parse_args()
    if options.docs:
        table = render(stored(options.output, RESULT_VERSION))
        put_in_page(DOCS / "quality.md", "quantization", table)
        return
    torch.set_num_threads(options.threads)
    calibration = Calibration(source=str(reference.CALIBRATION), samples=options.samples)
    windows = {name: windows_of(options.model, text) for name, text in reference.HELDOUT.items()}

    dense = load_model(options.model)

    def measured(model: Any) -> Costs:
        return {name: costs([model], dense, found)[0] for name, found in windows.items()}

    by_method: dict[str, Costs] = {}
    bits: dict[str, float] = {}
    for name, found, per_weight in _methods(options.model, calibration, measured):
        by_method[name], bits[name] = found, per_weight
        print(f"{name}: " + ", ".join(map(_brief, found.values())), flush=True)
    rows = [_row(name, by_method, bits[name]) for name in by_method]
    result = {
        "version": RESULT_VERSION,
        "environment": environment(),
        "samples": options.samples,
        "tokens": {
            name: int(cost.likelihood.tokens.sum()) for name, cost in by_method["dense"].items()
        },
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(rows)


def _methods(
    model: Path, calibration: Calibration, measured: Callable[[Any], Costs]
) -> Iterator[tuple[str, Costs, float]]:
    yield "dense", measured(load_model(model)), 16.0
    for name, plan in PLANS.items():
        with tempfile.TemporaryDirectory(prefix="camera-quantization-") as folder:
            packed, dense = Path(folder) / "packed", Path(folder) / "dense"
            # align 1: on experts of 128 micro-experts, multiples of 32 would blur the tiers.
            recipe = Recipe.paper(plan=TierPlan.parse(plan), calibration=calibration, align=1)
            compress(model, packed, recipe)
            convert_to_dense(packed, dense)
            yield name, measured(load_model(dense)), _bits_per_weight(model, packed)
    dagger = ablated(model, calibration, sliced_by_input(0.2))
    yield "CAMERA-Q†, r = 0.2", measured(dagger), 2.25
    grouped = ablated(model, calibration, down_along_micro_experts)
    yield "GPTQ, 2 bits, down grouped along micro-experts", measured(grouped), 2.25


def _bits_per_weight(model: Path, packed: Path) -> float:
    """Stored bits per original expert weight, scales and zeros counted."""
    before, after = Checkpoint.open(model), Checkpoint.open(packed)
    return 16 * after.expert_bytes / before.expert_bytes


def _brief(cost: Cost) -> str:
    return f"{math.exp(cost.likelihood.mean):.3f} ({cost.divergence.mean:.4f} nats)"


def _row(name: str, by_method: dict[str, Costs], bits: float) -> dict[str, Any]:
    base = by_method[BASE]
    texts = {text: _figures(cost, base[text]) for text, cost in by_method[name].items()}
    return {"method": name, "bits_per_weight": bits, "base": BASE, "texts": texts}


def _figures(cost: Cost, base: Cost) -> dict[str, float]:
    log_ratio, log_ratio_error = cost.likelihood.difference(base.likelihood)
    above, above_error = cost.divergence.difference(base.divergence)
    return {
        "perplexity": math.exp(cost.likelihood.mean),
        "log_ratio_to_base": log_ratio,
        "log_ratio_to_base_se": log_ratio_error,
        "divergence": cost.divergence.mean,
        "divergence_above_base": above,
        "divergence_above_base_se": above_error,
    }


def _cells(text: dict[str, float]) -> tuple[str, str]:
    change = f"{text['log_ratio_to_base']:+.2%} ± {text['log_ratio_to_base_se']:.2%}"
    above = f"{text['divergence_above_base']:+.4f} ± {text['divergence_above_base_se']:.4f}"
    return f"{text['perplexity']:.2f} ({change})", f"{text['divergence']:.4f} ({above})"


def render(result: dict[str, Any]) -> str:
    """The stored figures as a Markdown table, one line per method."""
    texts = list(result["tokens"])
    columns = [f"{text}, {what}" for text in texts for what in ("perplexity", "divergence")]
    lines = [
        f"| method | bits per weight | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in result["rows"]:
        cells = [cell for text in texts for cell in _cells(row["texts"][text])]
        lines.append(f"| {row['method']} | {row['bits_per_weight']:.2f} | {' | '.join(cells)} |")
    tokens = ", ".join(f"{count:,} tokens of {text}" for text, count in result["tokens"].items())
    found = result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"Perplexity of `bench/reference_moe/model` ({tokens}; {result['samples']} calibration "
            f"windows), and the divergence (KL, nats per token) of its predictions from the dense "
            f"model's; in brackets the change against {BASE} with its paired standard error. "
            f"{found['cpu']}, torch {found['torch']}, transformers {found['transformers']}, "
            f"commit {found['commit']}.",
        ]
    )


def _print(rows: list[dict[str, Any]]) -> None:
    texts = rows[0]["texts"]
    columns = [f"{text}, {what}" for text in texts for what in ("perplexity", "divergence")]
    table = Table("method", "bits", *columns)
    for row in rows:
        cells = [cell for text in row["texts"].values() for cell in _cells(text)]
        table.add_row(row["method"], f"{row['bits_per_weight']:.2f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
