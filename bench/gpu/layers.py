"""MoE layers one by one: ragged ones against vLLM's dense ones, correctness before speed."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import baselines
from bench.gpu.baselines import Call
from bench.gpu.random_layers import (
    DTYPE,
    Tokens,
    ragged_layer,
    random_tokens,
    weight_bytes,
)
from bench.gpu.timing import Run, ceilings, compare
from bench.shapes.published import SHAPES, Shape
from camera_serve.kernels.triton import pack_layer, ragged_moe
from camera_serve.ragged.layer import RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.layer import ragged_moe as reference
from camera_serve.recipe import TierPlan

PLANS = {
    "0%": TierPlan.parse("16:1"),
    "20%": TierPlan.prune(0.2),
    "40%": TierPlan.prune(0.4),
    "60%": TierPlan.prune(0.6),
    "2.25 bits": TierPlan.mixed(2, 0.2),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 8192)
CHECKED_TOKENS = (1, 33)
TOLERANCE = 3e-2
"""A layer in bfloat16 rounds weights, activations, each expert's output and the sum: a few times
2^-8. A wrong row, scale or route gives errors of order 1."""

ROTATED_BYTES = 2**29
"""Input sets differ until they touch this much weight: several times any card's cache."""

MOST_SETS = 32


class WrongResultError(RuntimeError):
    """A layer does not compute what it should: there is nothing to time."""


@dataclass(frozen=True)
class Candidate:
    """A layer to time; `bytes_` are those of its weights, `exact` what it is to compute."""

    call: Call
    bytes_: int
    exact: RaggedLayer | None


def measure(
    shapes: Sequence[str], tokens: Sequence[int], *, balanced: bool, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Check, then time every layer of every shape with every number of tokens; JSON values.

    Yields the result after each number of tokens, `left` naming those that are to come. Raises
    `WrongResultError`.
    """
    device = torch.device("cuda")
    left = [f"{name} with {count} tokens" for name in shapes for count in tokens]
    result: dict[str, Any] = {"ceilings": ceilings(device), "errors": {}, "bytes": {}, "rows": []}
    with baselines.vllm_context():
        for name in shapes:
            shape, candidates = SHAPES[name], layers_of(SHAPES[name], seed, device)
            result["bytes"][name] = {k: c.bytes_ for k, c in candidates.items()}
            result["errors"][name] = check_all(
                shape, candidates, CHECKED_TOKENS, seed, device, balanced=True
            )
            for count in tokens:
                # Other numbers of tokens take other tiles.
                errors = check_all(shape, candidates, [count], seed, device, balanced=balanced)
                row = _time(shape, candidates, count, seed, device, balanced=balanced)
                print(f"{name}, {count} tokens: {row}", flush=True)
                row_of = {"shape": name, "tokens": count, "errors": errors, "microseconds": row}
                result["rows"].append(row_of)
                yield result | {"left": left[len(result["rows"]) :]}
            del candidates
            torch.cuda.empty_cache()


def layers_of(shape: Shape, seed: int, device: torch.device) -> dict[str, Candidate]:
    """Every layer that is timed: vLLM's dense ones, Humming where it is installed, ragged ones."""
    found = _dense(shape, device)
    weights = 3 * shape.num_experts * shape.d_ff * shape.d_model
    for bits, call in baselines.humming_layers(shape, device).items():
        found[f"humming {bits} bits"] = Candidate(call, weights * bits // 8, None)
    for name, plan in PLANS.items():
        found[name] = ragged_candidate(ragged_layer(shape, plan, seed, device))
    return found


def ragged_candidate(layer: RaggedLayer) -> Candidate:
    """Ours, checked against the layer it was packed from."""
    packed = pack_layer(deepcopy(layer), DTYPE)
    return Candidate(
        lambda tokens: ragged_moe(tokens.x, tokens.weights, tokens.ids, packed),
        weight_bytes(layer),
        layer,
    )


def _dense(shape: Shape, device: torch.device) -> dict[str, Candidate]:
    experts, d_ff, d_model = shape.num_experts, shape.d_ff, shape.d_model
    std = d_model**-0.5
    w13 = torch.randn(experts, 2 * d_ff, d_model, device=device, dtype=DTYPE) * std
    w2 = torch.randn(experts, d_model, d_ff, device=device, dtype=DTYPE) * std
    calls = baselines.dense_layers(shape, w13, w2)
    exact = as_ragged(w13, w2)
    return {name: Candidate(call, w13.nbytes + w2.nbytes, exact) for name, call in calls.items()}


def as_ragged(w13: torch.Tensor, w2: torch.Tensor) -> RaggedLayer:
    """vLLM's dense weights as one tier of equal widths."""
    gate, up = (half.flatten(0, 1) for half in w13.chunk(2, dim=1))
    offsets = tuple(range(0, len(gate) + 1, w2.shape[2]))
    return RaggedLayer((RaggedTier(gate, up, w2.transpose(1, 2).flatten(0, 1), offsets),))


def check_all(
    shape: Shape,
    candidates: dict[str, Candidate],
    counts: Sequence[int],
    seed: int,
    device: torch.device,
    *,
    balanced: bool,
) -> dict[str, float]:
    """The largest relative error of each layer that has a reference, over numbers of tokens.

    Raises `WrongResultError`.
    """
    errors = {}
    for name, candidate in candidates.items():
        if candidate.exact is None:
            continue
        found = []
        for count in counts:
            tokens = random_tokens(shape, count, seed + count, device, balanced=balanced)
            found.append(error_of(candidate, tokens))
        errors[name] = max(found)
        # Not `>`: an error that is NaN is wrong as well.
        if not errors[name] <= TOLERANCE:
            raise WrongResultError(f"{name}: relative error {errors[name]:.2g} > {TOLERANCE}")
    return errors


def error_of(candidate: Candidate, tokens: Tokens) -> float:
    """`‖out - exact‖ / ‖exact‖`."""
    assert candidate.exact is not None
    wanted = exact_output(candidate.exact, tokens)
    out = candidate.call(tokens).float()
    return float((out - wanted).norm() / wanted.norm())


def exact_output(layer: RaggedLayer, tokens: Tokens) -> torch.Tensor:
    """What the layer is to compute, `[num_tokens, d_model]` in float32."""
    return reference(tokens.x.float(), tokens.weights, tokens.ids, _wide(layer))


def _wide(layer: RaggedLayer) -> RaggedLayer:
    """The layer with its 16-bit rows in float32; packed ones dequantize to what x is in."""
    tiers = []
    for tier in layer.tiers:
        gate, up, down = (_float(rows) for rows in (tier.gate, tier.up, tier.down))
        tiers.append(RaggedTier(gate, up, down, tier.offsets))
    return RaggedLayer(tuple(tiers))


def _float(rows: Rows) -> Rows:
    return rows.float() if isinstance(rows, torch.Tensor) else rows


def num_sets(shape: Shape, num_tokens: int, smallest_bytes: int) -> int:
    """Input sets that keep the weights the last calls used out of the cache."""
    share = min(1.0, num_tokens * shape.top_k / shape.num_experts)
    return max(2, min(MOST_SETS, round(ROTATED_BYTES / (share * smallest_bytes))))


def _time(
    shape: Shape,
    candidates: dict[str, Candidate],
    num_tokens: int,
    seed: int,
    device: torch.device,
    *,
    balanced: bool,
) -> dict[str, float]:
    sets = num_sets(shape, num_tokens, min(c.bytes_ for c in candidates.values()))
    inputs = [
        random_tokens(shape, num_tokens, seed, device, balanced=balanced) for _ in range(sets)
    ]
    runs = {name: _rotating(candidate.call, inputs) for name, candidate in candidates.items()}
    return {name: round(time, 2) for name, time in compare(runs, sets).items()}


def _rotating(call: Call, inputs: Sequence[Tokens]) -> Run:
    return lambda which: call(inputs[which])


def table(result: dict[str, Any]) -> str:
    """Microseconds of the best dense layer, and how many times faster the others are."""
    lines = []
    for row in result["rows"]:
        times = row["microseconds"]
        dense = min(time for name, time in times.items() if name.startswith("vllm"))
        others = [n for n in times if not n.startswith("vllm")]
        ratios = "  ".join(f"{n} {dense / times[n]:.2f}x" for n in others)
        lines.append(f"{row['shape']:>18} {row['tokens']:>5}  dense {dense:8.1f} us  {ratios}")
    found = result["ceilings"]
    copy, products = found["copy_gb_per_second"], found["bf16_tflop_per_second"]
    return "\n".join([*lines, f"ceilings: copy {copy:.0f} GB/s, bf16 {products:.0f} TFLOP/s"])
