"""What so many bits lose of the micro-experts of this very model: measured, not assumed.

How well an expert stands few bits differs from model to model. So some whole experts are quantized
as `compress` would, at each bit-width in turn, on seven eighths of the calibration tokens, and
judged on the last eighth: ρ(b) = ‖φW - φ̂Ŵ‖² / ‖φW‖². Relative to Σ_j E_j, which is less where
micro-experts pull together, removal would seem cheaper than it is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.experts import quantize_experts
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.gram import TOKENS_AT_ONCE, phi_of
from camera_serve.recipe import Recipe

ENOUGH = 64
"""Held back tokens that an expert must have seen to be measured, and 7 times as many to fit to."""

SHARE_OF_SOLVES = 0.1
"""So many solves of a run are made once more at most, to measure."""

LEAST_MEASURED = 8
"""From so many bits on, too little is lost to tell it from chance, or for it to matter."""

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layers_to_measure(moe_layers: Sequence[int], num_experts: int, recipe: Recipe) -> set[int]:
    """The layers of which one expert is measured: all, or as many as cost little, evenly spread.

    None where the plan says what each tier's share is, or where nothing may be packed.
    """
    bits = measured_bits(recipe)
    if recipe.plan is not None or not bits:
        return set()
    affordable = int(SHARE_OF_SOLVES * num_experts * len(moe_layers) / len(bits))
    count = min(max(1, affordable), len(moe_layers))
    return {moe_layers[(2 * n + 1) * len(moe_layers) // (2 * count)] for n in range(count)}


def measured_bits(recipe: Recipe) -> tuple[int, ...]:
    """The bit-widths whose losses are measured."""
    return tuple(bits for bits in recipe.packed if bits < LEAST_MEASURED)


@torch.inference_mode()
def measure_losses(
    experts: RaggedTier[torch.Tensor], inputs: RoutedInputs, recipe: Recipe, device: torch.device
) -> dict[int, float]:
    """ρ at each of `measured_bits`, of the expert of a layer that saw most; empty: none saw enough.

    experts: the layer's 16-bit rows, which stay as they are; inputs: what each was given.
    """
    fitting, held = inputs.split()
    counts = [len(tokens) for tokens in held.tokens]
    expert = max(range(len(counts)), key=counts.__getitem__)
    rows = experts.rows(expert)
    enough = counts[expert] >= ENOUGH and len(fitting.tokens[expert]) >= 7 * ENOUGH
    if rows.start == rows.stop or not enough:
        return {}
    own = _matrices(experts, rows, device)
    given = _given(own, held, expert)
    if not given > 0:
        return {}
    solved = _solved(RaggedTier(*own, (0, len(own[0]))), fitting.of(expert), recipe, device)
    shares = {bits: _error(own, made, held, expert) / given for bits, made in solved}
    return {bits: share for bits, share in shares.items() if math.isfinite(share)}


def _matrices(rows: RaggedTier[torch.Tensor], span: slice, device: torch.device) -> Matrices:
    gate, up, down = (
        matrix[span].to(device, torch.float32) for matrix in (rows.gate, rows.up, rows.down)
    )
    return gate, up, down


def _solved(
    own: RaggedTier[torch.Tensor], inputs: RoutedInputs, recipe: Recipe, device: torch.device
) -> Iterator[tuple[int, Matrices]]:
    """One expert at each of the bit-widths: as many experts of one layer, which saw the same."""
    widths, width = measured_bits(recipe), own.offsets[-1]
    gate, up, down = (matrix.repeat(len(widths), 1) for matrix in (own.gate, own.up, own.down))
    offsets = tuple(width * copy for copy in range(len(widths) + 1))
    seen = replace(inputs, tokens=inputs.tokens * len(widths), weights=inputs.weights * len(widths))
    found = quantize_experts(
        RaggedTier(gate, up, down, offsets),
        torch.tensor(widths).repeat_interleave(width),
        seen,
        group_size=recipe.group_size,
        solver=recipe.solver,
        weighted=recipe.weighted,
        refit=recipe.refit,
        polish=recipe.polishes,
        device=device,
    )
    for bits, quantized in zip(widths, found, strict=True):
        gate, up, down = (quantized.rows[p].dequantize().to(device) for p in PROJECTIONS)
        yield bits, (gate, up, down)


def _given(own: Matrices, inputs: RoutedInputs, expert: int) -> float:
    """‖φW‖² over an expert's tokens."""
    gate, up, down = own
    return sum(
        float((phi_of((gate, up), x, weights) @ down).square().sum(dtype=torch.float64))
        for x, weights in inputs.batches(expert, TOKENS_AT_ONCE, down.device)
    )


def _error(own: Matrices, made: Matrices, inputs: RoutedInputs, expert: int) -> float:
    """‖φW - φ̂Ŵ‖² over an expert's tokens."""
    error = 0.0
    for x, weights in inputs.batches(expert, TOKENS_AT_ONCE, own[0].device):
        wanted, found = (phi_of((g, u), x, weights) @ down for g, u, down in (own, made))
        error += float((wanted - found).square().sum(dtype=torch.float64))
    return error
