"""Routed experts by the C++ kernel, in bfloat16."""

from dataclasses import dataclass

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.utils.torch_utils import direct_register_custom_op

from camera_serve.kernels import cpu
from camera_serve.ragged.layer import RaggedLayer
from camera_serve.vllm_plugin.experts import Experts, hold, like_x

logger = init_logger(__name__)


@dataclass(frozen=True)
class _CpuExperts:
    """weights: offsets, gate_up and down, tier after tier."""

    weights: list[torch.Tensor]
    bits: list[int]
    group_size: int

    def __call__(
        self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.vllm.camera_cpu_moe(
            x, top_k_weights, top_k_ids, self.weights, self.bits, self.group_size
        )


def pack(holder: nn.Module, rows: RaggedLayer) -> Experts:
    """Hold the rows on `holder` as the kernel reads them, copied."""
    packed = cpu.pack_layer(rows)
    logger.info_once(
        "camera-serve: CPU kernel %s, activations of packed tiers in %s",
        cpu.isa(),
        cpu.activations(),
    )
    held = [
        hold(holder, f"{name}_{number}", getattr(tier, name))
        for number, tier in enumerate(packed.tiers)
        for name in ("offsets", "gate_up", "down")
    ]
    return _CpuExperts(held, [tier.bits for tier in packed.tiers], packed.group_size)


def _cpu_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    tiers: list[torch.Tensor],
    bits: list[int],
    group_size: int,
) -> torch.Tensor:
    layout = zip(bits, tiers[::3], tiers[1::3], tiers[2::3], strict=True)
    layer = cpu.CpuLayer(x.shape[1], group_size, tuple(cpu.CpuTier(*tier) for tier in layout))
    return cpu.ragged_moe(x, top_k_weights, top_k_ids, layer)


direct_register_custom_op(op_name="camera_cpu_moe", op_func=_cpu_moe, fake_impl=like_x)
