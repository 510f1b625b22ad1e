"""Routed experts in plain torch, for devices and dtypes without a kernel: a loop over experts."""

from dataclasses import dataclass

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows, ragged_moe
from camera_serve.vllm_plugin.experts import Experts, hold, like_x


@dataclass(frozen=True)
class _TorchExperts:
    """weights: gate, up and down, tier after tier, packed ones as words, scales and zeros."""

    weights: list[torch.Tensor]
    offsets: torch.Tensor
    bits: list[int]

    def __call__(
        self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.vllm.camera_ragged_moe(
            x, top_k_weights, top_k_ids, self.weights, self.offsets, self.bits
        )


def pack(holder: nn.Module, rows: RaggedLayer) -> Experts:
    """Hold the rows on `holder` as they are."""
    held: list[torch.Tensor] = []
    bits = []
    for tier in rows.tiers:
        bits.append(tier.gate.bits if isinstance(tier.gate, PackedRows) else 16)
        for matrix in (tier.gate, tier.up, tier.down):
            held += [hold(holder, f"rows_{len(held) + i}", t) for i, t in enumerate(_parts(matrix))]
    device = held[0].device
    offsets = torch.tensor([t.offsets for t in rows.tiers], dtype=torch.int64, device=device)
    holder.register_buffer("offsets", offsets, persistent=False)
    return _TorchExperts(held, offsets, bits)


def _parts(matrix: Rows) -> tuple[torch.Tensor, ...]:
    if isinstance(matrix, PackedRows):
        return (matrix.words, matrix.scales, matrix.zeros)
    return (matrix,)


def _ragged_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    rows: list[torch.Tensor],
    offsets: torch.Tensor,
    bits: list[int],
) -> torch.Tensor:
    held = iter(rows)
    tiers = []
    for b, owned in zip(bits, offsets.tolist(), strict=True):
        gate, up, down = (
            next(held) if b == 16 else PackedRows(b, next(held), next(held), next(held))
            for _ in range(3)
        )
        tiers.append(RaggedTier(gate, up, down, tuple(owned)))
    return ragged_moe(x, top_k_weights, top_k_ids, RaggedLayer(tuple(tiers)))


# Opaque, because the loop over experts depends on the routing, which torch.compile cannot trace.
# The offsets are a tensor argument and not looked up by a layer's number: compiled graphs are
# cached across engines, and a number in them could name another engine's layer.
direct_register_custom_op(op_name="camera_ragged_moe", op_func=_ragged_moe, fake_impl=like_x)
