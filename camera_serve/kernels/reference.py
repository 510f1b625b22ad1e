"""The ragged MoE layer in plain torch, grouped by expert: the oracle for every other kernel."""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class RaggedLayer:
    """The routed experts of one MoE layer, their micro-experts concatenated expert by expert.

    gate, up, down: `[num_rows, d_model]`; `down` is stored transposed, so that row j of the three
    is one micro-expert. offsets: `num_experts + 1` row indices; expert e owns the rows
    `offsets[e]:offsets[e + 1]`, possibly none.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer, empty ones included."""
        return len(self.offsets) - 1


def ragged_moe(
    x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor, layer: RaggedLayer
) -> torch.Tensor:
    """Weighted sum of the routed experts' outputs (Eq. 2), each expert at its own d_ff.

    x: `[num_tokens, d_model]`; top_k_weights: float `[num_tokens, top_k]`; top_k_ids: int
    `[num_tokens, top_k]`, where an id outside `[0, num_experts)` means "not held here" and adds
    nothing. Returns a new `[num_tokens, d_model]` of x's dtype; sums in float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(layer.num_experts):
        start, end = layer.offsets[expert], layer.offsets[expert + 1]
        tokens, slots = torch.where(top_k_ids == expert)
        if start == end or len(tokens) == 0:
            continue
        routed = x[tokens]
        gate = functional.linear(routed, layer.gate[start:end])
        up = functional.linear(routed, layer.up[start:end])
        contribution = (functional.silu(gate) * up) @ layer.down[start:end]
        out.index_add_(0, tokens, contribution.float() * top_k_weights[tokens, slots, None])
    return out.to(x.dtype)
