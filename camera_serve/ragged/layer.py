"""The ragged MoE layer in plain torch, grouped by expert: the oracle for every other kernel."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.nn import functional

from camera_serve.ragged.packing import unpack


@dataclass(frozen=True)
class PackedRows:
    """Quantized rows, `code · scale + zero` per group of consecutive weights.

    words: int32 `[num_rows, words]` (`ragged.packing`); scales, zeros: float16
    `[num_rows, d_model / group_size]`.
    """

    bits: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """The weights of some rows, `[num_rows, d_model]` in `dtype`, computed in float32."""
        words = self.words[rows]
        d_model = words.shape[1] * 32 // self.bits
        codes = unpack(words, self.bits, d_model).float()
        groups = codes.unflatten(1, (self.scales.shape[1], -1))
        scales, zeros = self.scales[rows].float(), self.zeros[rows].float()
        return (groups * scales[..., None] + zeros[..., None]).flatten(1).to(dtype)


@dataclass(frozen=True)
class QuantizedRows:
    """The quantized micro-experts of one projection of one expert.

    codes: uint8 `[num_rows, d_model]`; scales, zeros: float16 `[num_rows, num_groups]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 `[num_rows, d_model]`."""
        groups = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        scaled = groups * self.scales.float()[..., None] + self.zeros.float()[..., None]
        return scaled.flatten(1)


Rows = torch.Tensor | PackedRows
"""The rows of one projection: 16-bit weights as they are, or packed ones."""

AnyRows = TypeVar("AnyRows", bound=Rows, covariant=True)


@dataclass(frozen=True)
class RaggedTier(Generic[AnyRows]):
    """The micro-experts of one tier of a MoE layer, concatenated expert by expert.

    gate, up, down: `[num_rows, d_model]`; `down` is stored transposed, so that row j of the three
    is one micro-expert. offsets: `num_experts + 1` row indices; expert e owns the rows
    `offsets[e]:offsets[e + 1]`, possibly none.
    """

    gate: AnyRows
    up: AnyRows
    down: AnyRows
    offsets: tuple[int, ...]

    def rows(self, expert: int) -> slice:
        """The rows of one expert."""
        return slice(self.offsets[expert], self.offsets[expert + 1])


@dataclass(frozen=True)
class RaggedLayer:
    """The routed experts of one MoE layer, tier by tier: its output is the sum over tiers."""

    tiers: tuple[RaggedTier[Rows], ...]

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer, empty ones included."""
        return len(self.tiers[0].offsets) - 1


def ragged_moe(
    x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor, layer: RaggedLayer
) -> torch.Tensor:
    """Weighted sum of the routed experts' outputs (Eq. 2), each expert at its own d_ff and bits.

    x: `[num_tokens, d_model]`; top_k_weights: float `[num_tokens, top_k]`; top_k_ids: int
    `[num_tokens, top_k]`, where an id outside `[0, num_experts)` means "not held here" and adds
    nothing. Returns a new `[num_tokens, d_model]` of x's dtype; sums in float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(layer.num_experts):
        tokens, slots = torch.where(top_k_ids == expert)
        if len(tokens) == 0:
            continue
        routed, weights = x[tokens], top_k_weights[tokens, slots, None]
        for tier in layer.tiers:
            rows = tier.rows(expert)
            if rows.start < rows.stop:
                out.index_add_(0, tokens, micro_experts(routed, tier, rows).float() * weights)
    return out.to(x.dtype)


def micro_experts(x: torch.Tensor, tier: RaggedTier[Rows], rows: slice) -> torch.Tensor:
    """The summed output of some micro-experts of a tier (Eq. 3): `[num_tokens, d_model]` of x."""
    gate = functional.linear(x, dense_rows(tier.gate, rows, x.dtype))
    up = functional.linear(x, dense_rows(tier.up, rows, x.dtype))
    return (functional.silu(gate) * up) @ dense_rows(tier.down, rows, x.dtype)


def dense_rows(matrix: Rows, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows as weights: a view where they are stored so, dequantized where they are packed."""
    if isinstance(matrix, PackedRows):
        return matrix.dequantize(rows, dtype)
    return matrix[rows]
