"""Routed experts by the Triton kernels. Only imported where they can run: it imports Triton."""

from dataclasses import dataclass

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from camera_serve.kernels.triton import TritonLayer, TritonTier, pack_layer, ragged_moe
from camera_serve.ragged.layer import RaggedLayer
from camera_serve.vllm_plugin.experts import Experts, hold, like_x

_PARTS = ("gate", "up", "down", "gate_grid", "up_grid", "down_grid")


@dataclass(frozen=True)
class _TritonExperts:
    """A `TritonLayer` in pieces; weights: tier after tier, those of a tier as in `_PARTS`."""

    weights: list[torch.Tensor]
    bits: list[int]
    offsets: torch.Tensor
    tile_lists: list[torch.Tensor]
    group_size: int
    most_rows: int
    width: int

    def __call__(
        self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.vllm.camera_triton_moe(
            x,
            top_k_weights,
            top_k_ids,
            self.weights,
            self.bits,
            self.offsets,
            self.tile_lists,
            self.group_size,
            self.most_rows,
            self.width,
        )


def pack(holder: nn.Module, rows: RaggedLayer, dtype: torch.dtype) -> Experts:
    """Hold the rows on `holder` as the kernels read them: in place, `rows` are used up.

    dtype: of the activations.
    """
    packed = pack_layer(rows, dtype)
    tiers = [
        hold(holder, f"{name}_{number}", getattr(tier, name))
        for number, tier in enumerate(packed.tiers)
        for name in _PARTS
    ]
    indices = (packed.offsets, *packed.tile_lists)
    for number, tensor in enumerate(indices):
        holder.register_buffer(f"indices_{number}", tensor, persistent=False)
    return _TritonExperts(
        tiers,
        [tier.bits for tier in packed.tiers],
        packed.offsets,
        list(packed.tile_lists),
        packed.group_size,
        packed.most_rows,
        packed.width,
    )


def compile_kernels(experts: Experts, x: torch.Tensor, top_k: int, num_experts: int) -> None:
    """Compile what batches of up to as many tokens as x will need, or requests would wait for it.

    Powers of two, and the most there can be, meet every row of the table of tile sizes: each row
    reaches at least twice as far as the one before.
    """
    for count in sorted({len(x)}.union(2**n for n in range(len(x).bit_length()))):
        slots = torch.arange(count * top_k, dtype=torch.int32, device=x.device)
        ids = (slots % num_experts).view(count, top_k)
        experts(x[:count], torch.ones(ids.shape, dtype=torch.float32, device=x.device), ids)


def _triton_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    tiers: list[torch.Tensor],
    bits: list[int],
    offsets: torch.Tensor,
    tile_lists: list[torch.Tensor],
    group_size: int,
    most_rows: int,
    width: int,
) -> torch.Tensor:
    by_tier = zip(bits, *(tiers[part :: len(_PARTS)] for part in range(len(_PARTS))), strict=True)
    layer = TritonLayer(
        tiers=tuple(TritonTier(*tier) for tier in by_tier),
        offsets=offsets,
        tile_lists=tuple(tile_lists),
        num_experts=offsets.shape[1] - 1,
        d_model=x.shape[1],
        group_size=group_size,
        most_rows=most_rows,
        width=width,
    )
    return ragged_moe(x, top_k_weights, top_k_ids, layer)


# Launches depend on shapes alone, so that CUDA graphs may capture them. Whatever decides about
# them is an argument: compiled graphs are cached across engines.
direct_register_custom_op(op_name="camera_triton_moe", op_func=_triton_moe, fake_impl=like_x)
