"""Routed experts in vLLM: ragged parameters, their loading, and the choice of the kernel."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig

from camera_serve.checkpoint.format import PARTS, Part, Tiers
from camera_serve.models import Projection
from camera_serve.ragged.layer import RaggedLayer
from camera_serve.vllm_plugin import choice
from camera_serve.vllm_plugin.compat import MoEMethodBase, weights_are_read
from camera_serve.vllm_plugin.experts import Experts, expect, install, release
from camera_serve.vllm_plugin.loading import (
    RankRows,
    RankSplit,
    RowLoader,
    TierCounts,
    fill_dummy_grids,
    part_dtype,
    ragged_layer,
    split_layer,
)
from camera_serve.vllm_plugin.refusals import refuse_layer

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

Pack = Callable[[nn.Module, RaggedLayer, torch.Tensor, int], Experts]
"""What `choice.pack` does: a module to hold the rows, the rows, a tensor like x, top_k."""

_PROJECTIONS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}


class CameraMoEMethod(MoEMethodBase):
    """The experts of one MoE layer, each at its own d_ff.

    counts: micro-experts by expert and tier; moe_prefix: `model.layers.3.mlp`; name: the checkpoint
    prefix of an expert's projection; pack: who makes a kernel of the loaded rows.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        counts: TierCounts,
        tiers: Tiers,
        moe_prefix: str,
        name: Callable[[int, Projection], str],
        pack: Pack = choice.pack,
    ) -> None:
        super().__init__(moe)
        self._counts = counts
        self._tiers = tiers
        self._prefix = moe_prefix
        self._name = name
        self._pack = pack
        self._loader: RowLoader | None = None
        self._experts: Experts | None = None

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the rank's rows of every tier only (`RankRows`); gate and up come in pairs.

        Down is stored transposed. Experts of other ranks have no rows, so global expert ids index
        the offsets on every rank and no expert map is needed. Raises `ServingError` for a layer the
        kernels do not reproduce.
        """
        refuse_layer(layer, self._prefix, len(self._counts))
        split = self._split(layer)
        self._loader = RowLoader(split, self._tiers, self._name, hidden_size)
        for part, shape in RankRows.shapes(split.num_rows, self._tiers, hidden_size).items():
            dtype = part_dtype(part, params_dtype)
            for name, full in ((f"w13_{part}", (2, *shape)), (f"w2_{part}", shape)):
                empty = torch.empty(full, dtype=dtype)
                expect(layer, name, empty, self._loading(part))

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """The sizes as they are: the kernel needs no padding."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> None:
        """None: vLLM's own MoE kernels are not used."""

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Refuse to serve weights that never arrived; random weights are wanted for `dummy`.

        Then hand the rows over to the fastest kernel there is for the device and dtype, or to the
        one that runs already.
        """
        if not weights_are_read():
            fill_dummy_grids(layer.w13_scales, layer.w2_scales)
        elif self._loader:
            self._loader.check_complete()
        like, top_k = layer.w2_weight.data, self.moe.experts_per_token
        rows = self._rows(layer)
        self._experts = install(
            layer, self._experts, lambda holder: self._pack(holder, rows, like, top_k)
        )
        release(layer, (f"{half}_{part}" for half in ("w13", "w2") for part in PARTS))

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The rank's summand of the layer's output, as x: `[num_tokens, d_model]`."""
        assert self._experts is not None
        return self._experts(x, topk_weights, topk_ids)

    def _rows(self, layer: "RoutedExperts") -> RaggedLayer:
        """The rows that were loaded, as views."""
        assert self._loader is not None
        w13 = [getattr(layer, f"w13_{part}").data for part in PARTS]
        gate, up = (RankRows(*parts) for parts in zip(*w13, strict=True))
        down = RankRows(*(getattr(layer, f"w2_{part}").data for part in PARTS))
        return ragged_layer(gate, up, down, self._loader.split, self._tiers.bits)

    def _loading(self, part: Part) -> Callable[..., bool]:
        def load(
            layer: "RoutedExperts",
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            assert self._loader is not None
            if shard_id == "w2":
                held = RankRows(*(getattr(layer, f"w2_{p}").data for p in PARTS))
            else:
                half = 0 if shard_id == "w1" else 1
                held = RankRows(*(getattr(layer, f"w13_{p}").data[half] for p in PARTS))
            rows = held.by_tier(self._loader.split.num_rows, self._tiers.bits)
            return self._loader.load(rows, loaded_weight, expert_id, _PROJECTIONS[shard_id], part)

        return load

    def _split(self, layer: "RoutedExperts") -> RankSplit:
        local_id = layer._map_global_expert_id_to_local_expert_id
        return split_layer(
            self._counts,
            tp_size=self.moe.tp_size,
            tp_rank=self.moe.tp_rank,
            held=[local_id(expert) >= 0 for expert in range(len(self._counts))],
        )
