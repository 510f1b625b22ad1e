"""Ragged expert modules for transformers models, and how their weights are put together on load."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from camera_serve.kernels import RaggedLayer, ragged_moe
from camera_serve.layout import LayerLayout
from camera_serve.models import MoeStructure
from camera_serve.models.structure import PROJECTIONS


class RaggedExperts(nn.Module):
    """The routed experts of one MoE layer, each at its own d_ff.

    gate, up, down: `[sum(expert_d_ff), d_model]`, see `RaggedLayer`; None when the layer kept no
    micro-expert, because transformers would miss an empty tensor in the checkpoint.
    """

    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, d_model: int, expert_d_ff: tuple[int, ...]) -> None:
        super().__init__()
        self.offsets = tuple(accumulate(expert_d_ff, initial=0))
        num_rows = self.offsets[-1]
        for projection in PROJECTIONS:
            rows = nn.Parameter(torch.empty(num_rows, d_model)) if num_rows else None
            self.register_parameter(projection, rows)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """transformers' experts interface: `[num_tokens, d_model]` to the same shape and dtype."""
        if self.offsets[-1] == 0:
            return torch.zeros_like(hidden_states)
        layer = RaggedLayer(self.gate, self.up, self.down, self.offsets)
        return ragged_moe(hidden_states, top_k_weights, top_k_index, layer)


class NoSharedExpert(nn.Module):
    """A shared expert that kept no micro-expert."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros like the input."""
        return torch.zeros_like(hidden_states)


class ConcatRows(ConversionOps):
    """Concatenates per-expert tensors into a ragged layer's rows (Algorithm 2, lines 10-13)."""

    def __init__(self, transpose: bool) -> None:
        self.transpose = transpose

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """`[d_ff_e, d_model]` per expert (down: `[d_model, d_ff_e]`) to `[num_rows, d_model]`.

        transformers hands the tensors over in the order of their expert numbers.
        """
        (tensors,) = input_dict.values()
        rows = [tensor.T for tensor in tensors] if self.transpose else tensors
        return {target_patterns[0]: torch.cat(rows)}


def converters(structure: MoeStructure) -> list[WeightConverter]:
    """One converter per projection, from the checkpoint's per-expert names to `RaggedExperts`."""
    return [
        WeightConverter(
            source_patterns=f"mlp.experts.*.{structure.projection_name(projection)}.weight",
            target_patterns=f"mlp.experts.{projection}",
            operations=[ConcatRows(transpose=projection == "down")],
        )
        for projection in PROJECTIONS
    ]


def replace_moe_layers(
    model: nn.Module, structure: MoeStructure, layouts: Mapping[str, LayerLayout]
) -> None:
    """Swap the experts and shared experts of `model` for modules of their kept widths.

    layouts: `LayerLayout` by MoE prefix in the checkpoint (`model.layers.3.mlp`).
    """
    for layer in structure.moe_layers:
        prefix = structure.moe_prefix(layer)
        layout = layouts[prefix]
        moe = model.get_submodule(structure.to_hf_name(f"{prefix}.experts").rpartition(".")[0])
        moe.experts = RaggedExperts(structure.d_model, layout.expert_d_ff)
        for width in layout.shared_d_ff:
            _narrow_shared_expert(moe, structure, width)


def _narrow_shared_expert(moe: nn.Module, structure: MoeStructure, width: int) -> None:
    name = str(structure.family.shared_name)
    if width == 0:
        setattr(moe, name, NoSharedExpert())
        return
    mlp = moe.get_submodule(name)
    mlp.gate_proj = nn.Linear(structure.d_model, width, bias=False)
    mlp.up_proj = nn.Linear(structure.d_model, width, bias=False)
    mlp.down_proj = nn.Linear(width, structure.d_model, bias=False)
