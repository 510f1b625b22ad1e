"""Ragged experts as transformers modules: plain tiers as parameters, packed tiers as buffers."""

import torch
from torch import nn
from transformers import PreTrainedModel

from camera_serve.checkpoint.experts import read_experts, read_shared_experts
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.models import MoeStructure
from camera_serve.models.modules import layer_stack
from camera_serve.ragged.layer import (
    PackedRows,
    RaggedLayer,
    RaggedTier,
    Rows,
    micro_experts,
    ragged_moe,
)


class RowsModule(nn.Module):
    """The rows of one projection in one tier; packed rows stay packed."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = rows.bits if isinstance(rows, PackedRows) else 16
        if isinstance(rows, PackedRows):
            self.register_buffer("words", rows.words)
            self.register_buffer("scales", rows.scales)
            self.register_buffer("zeros", rows.zeros)
        else:
            self.weight = nn.Parameter(rows.to(dtype), requires_grad=False)

    def rows(self) -> Rows:
        """The rows as the kernel takes them."""
        if self.bits == 16:
            return self.weight
        words, scales, zeros = (self.get_buffer(name) for name in ("words", "scales", "zeros"))
        # A model moved to another dtype takes its buffers along: scales are float16 by format.
        return PackedRows(self.bits, words, scales.half(), zeros.half())


class TierModule(nn.Module):
    """One tier of a ragged layer."""

    def __init__(self, tier: RaggedTier, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            RowsModule(rows, dtype) for rows in (tier.gate, tier.up, tier.down)
        )
        self.offsets = tier.offsets

    def tier(self) -> RaggedTier:
        """The tier as the kernel takes it."""
        return RaggedTier(self.gate.rows(), self.up.rows(), self.down.rows(), self.offsets)


class RaggedExperts(nn.Module):
    """The routed experts of one MoE layer, each at its own d_ff and bits."""

    def __init__(self, layer: RaggedLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.tiers = nn.ModuleList(TierModule(tier, dtype) for tier in layer.tiers)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """transformers' experts interface: `[num_tokens, d_model]` to the same shape and dtype."""
        layer = RaggedLayer(_tiers(self.tiers))
        return ragged_moe(hidden_states, top_k_weights, top_k_index, layer)


class RaggedSharedExperts(nn.Module):
    """The shared experts of one MoE layer, one MLP of their kept width."""

    def __init__(self, layer: RaggedLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.tiers = nn.ModuleList(TierModule(tier, dtype) for tier in layer.tiers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` to the same shape and dtype."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        for tier in _tiers(self.tiers):
            if tier.offsets[-1]:
                out += micro_experts(tokens, tier, tier.rows(0)).float()
        return out.to(hidden_states.dtype).view(hidden_states.shape)


def remove_experts(model: PreTrainedModel, structure: MoeStructure) -> list[str]:
    """Take the experts out of a model on the meta device: `add_experts` reads them apart.

    Returns how the names of their weights begin in this model, which may be a part of the whole.
    """
    names = {module: name for name, module in model.named_modules()}
    parts = ["experts", *([structure.modules.shared_name] if structure.shared_d_ff else [])]
    moe_layers = _moe_layers(model, structure).values()
    for moe in moe_layers:
        for part in parts:
            setattr(moe, part, nn.Identity())
    return [f"{names[moe]}.{part}." for moe in moe_layers for part in parts]


def add_experts(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Read the ragged experts of every MoE layer and put them where the family's own stood."""
    for layer, moe in _moe_layers(model, checkpoint.structure).items():
        put_experts(moe, checkpoint, layer, dtype)


def put_experts(moe: nn.Module, checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> None:
    """Put a checkpoint's ragged experts of one layer into a MoE module, shared ones included."""
    structure = checkpoint.structure
    device = next(moe.parameters()).device
    moe.experts = RaggedExperts(read_experts(checkpoint, layer), dtype).to(device)
    if structure.shared_d_ff:
        shared = RaggedSharedExperts(read_shared_experts(checkpoint, layer), dtype)
        setattr(moe, structure.modules.shared_name, shared.to(device))


def _tiers(modules: nn.ModuleList) -> tuple[RaggedTier[Rows], ...]:
    return tuple(module.tier() for module in modules if isinstance(module, TierModule))


def _moe_layers(model: PreTrainedModel, structure: MoeStructure) -> dict[int, nn.Module]:
    layers = layer_stack(model, structure.modules).layers
    name = structure.modules.moe_name
    return {layer: layers.get_submodule(f"{layer}.{name}") for layer in structure.moe_layers}
