"""What more tiers in an expert, and widths in smaller multiples, cost the CPU kernel.

    python -m bench.speed.tiers [--tokens 1,32,512]
    python -m bench.speed.tiers --docs

A layer of Qwen3-30B-A3B's shape with random weights, its experts as wide in each tier as plans and
allocations make them of energies as uneven as the reference MoE's. All take the same bytes, and are
timed in turn, so only ratios count. The second puts the stored table in docs/speed.md.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench import reference
from bench.shapes.published import SHAPES, Shape, layer_energies
from bench.speed.contestants import (
    Contestant,
    DenseWeights,
    camera_named,
    layer_of,
    micro_expert_bytes,
)
from bench.speed.kernels import time_in_turn
from bench.speed.limits import Ruler
from bench.speed.moe_inputs import inputs_of
from bench.stored import DOCS, environment, put_in_page, stored
from camera_serve.compression.allocation import fill
from camera_serve.ragged.layout import tier_totals
from camera_serve.ranking.selection import select
from camera_serve.ranking.survey import LayerSurvey
from camera_serve.recipe import SERVED_BITS, TierPlan

RESULTS = reference.ROOT / "bench" / "results" / "tiers-cpu.json"
RESULT_VERSION = 1
SHAPE = "qwen3-30b-a3b"
TOKENS = (1, 32, 512)
ALIGNS = (32, 16, 8, 1)
ROUNDS = 2
PLANS = {"3, 2 and 1 bits": TierPlan.mixed(2, 0.2), "40% removed": TierPlan.prune(0.4)}
ALLOWED = {
    "any bits": SERVED_BITS,
    "4, 3, 2, 0 bits": (4, 3, 2, 0),
    "3, 2, 0 bits": (3, 2, 0),
}


def main() -> None:
    """Time all layouts and store the ratios, or put the stored table in the docs."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.tiers")
    parser.add_argument("--tokens", type=_counts, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per layout and cell")
    parser.add_argument("--experts", type=int, default=64, help="of the layer: all need memory")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only put the stored table there")
    options = parser.parse_args()
    if not options.docs:
        torch.set_num_threads(1)
        shape = SHAPES[SHAPE].model_copy(update={"num_experts": options.experts})
        result = measure(shape, options.tokens, options.seconds)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = render(stored(options.output, RESULT_VERSION))
    print(table)
    if options.docs:
        put_in_page(DOCS / "speed.md", "tiers", table)


def measure(shape: Shape, tokens: Sequence[int], seconds: float) -> dict[str, Any]:
    """Every layout's time over that of its base, at each number of tokens."""
    generator = torch.Generator().manual_seed(0)
    rivals = list(_contestants(shape, DenseWeights.random(shape, generator), generator))
    ruler, rows = Ruler(1), []
    for count in tokens:
        inputs = list(islice(inputs_of(shape, count, "even", 0), ROUNDS * shape.num_experts))
        times = time_in_turn(rivals, inputs, seconds, ruler)
        medians = {name: statistics.median(found) for name, found in times.items()}
        for rival in rivals:
            base = medians[_base_of(rival.name)]
            rows.append(
                {
                    "layout": rival.name,
                    "tokens": count,
                    "bytes": int(rival.expert_bytes.sum()),
                    "time": medians[rival.name] / base,
                }
            )
    return {"version": RESULT_VERSION, "environment": environment(), "rows": rows}


def _contestants(
    shape: Shape, dense: DenseWeights, generator: torch.Generator
) -> Iterator[Contestant]:
    energies = layer_energies(shape, 0)
    order = tuple(own.argsort() for own in energies.per_expert)
    costs = tuple(own.sort().values for own in energies.per_expert)
    # Vectors of no size, so that energies alone say what micro-experts are worth.
    norms = tuple(torch.zeros_like(own) for own in costs)
    apart = torch.ones(len(costs), dtype=torch.bool)
    survey = LayerSurvey(energies, 1.0, order, costs, norms, apart)
    for name, plan in PLANS.items():
        for align in ALIGNS:
            selection = select(energies, plan, align)
            layer = layer_of(shape, plan.bits, selection.layout, dense, generator)
            yield camera_named(_named(name, align), layer, plan.bits, shape.d_model)
    whole = len(energies.shared) + energies.experts.numel()
    totals = tier_totals(PLANS["3, 2 and 1 bits"], whole, max(ALIGNS))
    budget = sum(n * micro_expert_bytes(bits, shape.d_model) for bits, n in totals.items())
    for name, allowed in ALLOWED.items():
        sizes = {bits: micro_expert_bytes(bits, shape.d_model) if bits else 0 for bits in allowed}
        for align in ALIGNS:
            (selection,) = fill([survey], sizes, budget, align)
            layer = layer_of(shape, selection.bits, selection.layout, dense, generator)
            yield camera_named(_named(name, align), layer, selection.bits, shape.d_model)


def _named(name: str, align: int) -> str:
    return f"{name}, multiples of {align}"


def _base_of(layout: str) -> str:
    name = layout.rpartition(", multiples")[0]
    return _named(name if name in PLANS else "3, 2 and 1 bits", max(ALIGNS))


def render(result: dict[str, Any]) -> str:
    """The stored ratios as a Markdown table, one line per layout."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    lines = ["| layout | " + " | ".join(f"{count} tokens" for count in tokens) + " |"]
    lines.append("|---" * (len(tokens) + 1) + "|")
    layouts = dict.fromkeys(row["layout"] for row in result["rows"])
    for layout in layouts:
        by_tokens = {r["tokens"]: r["time"] for r in result["rows"] if r["layout"] == layout}
        cells = [f"{by_tokens[count]:.2f}×" for count in tokens]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    found = result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            "Time of a MoE layer of Qwen3-30B-A3B's shape, one thread, over that of the same bytes "
            "in 3, 2 and 1 bits in multiples of 32 (of those pruned: over multiples of 32). "
            f"{found['cpu']}, commit {found['commit']}.",
        ]
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
