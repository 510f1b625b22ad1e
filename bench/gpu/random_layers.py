"""One MoE layer with random weights, dense or as a plan leaves it, and tokens for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.shapes.published import Shape, layer_counts, layer_energies
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.packing import words_per_row
from camera_serve.recipe import TierPlan

GROUP_SIZE = 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Tokens:
    """What a router hands on: x `[num_tokens, d_model]`, and of its top_k the weights and ids."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


def ragged_layer(shape: Shape, plan: TierPlan, seed: int, device: torch.device) -> RaggedLayer:
    """The routed experts that `plan` leaves of layer `seed`, their weights random."""
    counts = layer_counts(shape, plan, seed).experts
    tiers = []
    for bits, widths in zip(plan.bits, zip(*counts, strict=True), strict=True):
        offsets = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
        gate, up, down = (_rows(shape.d_model, offsets[-1], bits, device) for _ in range(3))
        tiers.append(RaggedTier(gate, up, down, offsets))
    return RaggedLayer(tuple(tiers))


def random_tokens(
    shape: Shape, num_tokens: int, seed: int, device: torch.device, *, balanced: bool
) -> Tokens:
    """Tokens that layer `seed`'s experts see in their own shares, or in equal ones."""
    shares = torch.ones(shape.num_experts, dtype=torch.float64)
    if not balanced:
        shares = layer_energies(shape, seed).tokens.double().clamp(min=1)
    chances = shares.expand(num_tokens, -1).float().to(device)
    ids = torch.multinomial(chances, shape.top_k)
    weights = torch.rand(num_tokens, shape.top_k, device=device)
    x = torch.randn(num_tokens, shape.d_model, device=device, dtype=DTYPE)
    return Tokens(x, weights / weights.sum(1, keepdim=True), ids.to(torch.int32))


def weight_bytes(layer: RaggedLayer) -> int:
    """Bytes of all rows, scales and zeros included."""
    matrices = [m for tier in layer.tiers for m in (tier.gate, tier.up, tier.down)]
    return sum(tensor.nbytes for matrix in matrices for tensor in _parts(matrix))


def _parts(matrix: Rows) -> Sequence[torch.Tensor]:
    if isinstance(matrix, PackedRows):
        return (matrix.words, matrix.scales, matrix.zeros)
    return (matrix,)


def _rows(d_model: int, num_rows: int, bits: int, device: torch.device) -> Rows:
    """Weights of variance 1 / d_model, so that outputs are of order 1."""
    std = d_model**-0.5
    if bits == 16:
        return torch.randn(num_rows, d_model, device=device, dtype=DTYPE) * std
    shape = (num_rows, words_per_row(d_model, bits))
    words = torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int32)
    # 2**b equally likely codes have the variance (4**b - 1) / 12.
    scale = std * math.sqrt(12 / (4**bits - 1))
    scales = torch.full((num_rows, d_model // GROUP_SIZE), scale, device=device).half()
    return PackedRows(bits, words, scales, scales * -((2**bits - 1) / 2))
