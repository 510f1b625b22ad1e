"""Shared experts with packed tiers in vLLM: linear layers that dequantize their rows once loaded.

Every token goes through them, and dequantizing at every call took 80 times as long as the product.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import Parameter, functional
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from camera_serve.checkpoint.format import PARTS, Part, Tiers
from camera_serve.kernels import dense_rows
from camera_serve.models import Projection
from camera_serve.vllm_plugin.compat import weights_are_read
from camera_serve.vllm_plugin.loading import (
    RankRows,
    RowLoader,
    TierCounts,
    fill_dummy_grids,
    part_dtype,
    split_layer,
)

ROWS_AT_ONCE = 1024
"""Rows dequantized together: float32 for them lies beside the weights for a moment."""

_PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
}


class PackedLinearMethod(LinearMethodBase):
    """One linear layer of a shared expert, its rows in `RankRows`, one for each projection.

    counts: `[1][tiers]` of the one shared MLP; module: `model.layers.3.mlp.shared_expert`; linear:
    `gate_up_proj` or `down_proj`.
    """

    def __init__(self, counts: TierCounts, tiers: Tiers, module: str, linear: str) -> None:
        self._counts = counts
        self._tiers = tiers
        self._module = module
        self._projections = _PROJECTIONS[linear]
        self._loader: RowLoader | None = None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate exactly the rank's rows of every tier, `[projections, …]` each."""
        d_model = output_size if self._projections == ("down",) else input_size
        split = split_layer(self._counts, tp_size=layer.tp_size, tp_rank=layer.tp_rank)
        self._loader = RowLoader(split, self._tiers, self._name, d_model, self._projections)
        for part, shape in RankRows.shapes(split.num_rows, self._tiers, d_model).items():
            full = (len(self._projections), *shape)
            empty = torch.empty(full, dtype=part_dtype(part, params_dtype))
            weight = Parameter(empty, requires_grad=False)
            set_weight_attrs(weight, {"weight_loader": partial(self._load, layer, part)})
            layer.register_parameter(part, weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse weights that never arrived; random weights are wanted for `dummy`.

        Then dequantize: packed rows are given up for `dense_weight`, in the model's dtype.
        """
        if not weights_are_read():
            fill_dummy_grids(layer.scales)
        elif self._loader:
            self._loader.check_complete()
        layer.register_parameter("dense_weight", Parameter(self._dense(layer), requires_grad=False))
        for part in PARTS:
            getattr(layer, part).data = torch.empty(0)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """gate_up: `[num_tokens, d_model]` to `[num_tokens, 2 * width]`, gate's first.

        down: `[num_tokens, width]` to the rank's part of `[num_tokens, d_model]`.
        """
        return functional.linear(x, layer.dense_weight)

    def _dense(self, layer: Any) -> torch.Tensor:
        """The weight of one ordinary linear layer, `[outputs, inputs]`."""
        assert self._loader is not None
        num_rows, weights = self._loader.split.num_rows, layer.weight
        shape = (len(self._projections), self._width, layer.weight.shape[2])
        dense = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        for projection, rows in enumerate(dense):
            held = RankRows(*(getattr(layer, part).data[projection] for part in PARTS))
            tiers = held.by_tier(num_rows, self._tiers.bits)
            for tier, own in zip(tiers, rows[: sum(num_rows)].split(list(num_rows)), strict=True):
                for start in range(0, len(own), ROWS_AT_ONCE):
                    some = slice(start, min(start + ROWS_AT_ONCE, len(own)))
                    own[some] = dense_rows(tier, some, own.dtype)
        down = self._projections == ("down",)
        return dense[0].T.contiguous() if down else dense.flatten(0, 1)

    @property
    def _width(self) -> int:
        """Activations of this rank; one of zeros if it has none: 0 kills vLLM's CPU kernels."""
        assert self._loader is not None
        return max(1, sum(self._loader.split.num_rows))

    def _load(
        self,
        layer: LinearBase,
        part: Part,
        param: Parameter,
        loaded_weight: torch.Tensor,
        shard_id: int | None = None,
    ) -> None:
        assert self._loader is not None
        index = shard_id or 0
        held = RankRows(*(getattr(layer, p).data[index] for p in PARTS))
        rows = held.by_tier(self._loader.split.num_rows, self._tiers.bits)
        self._loader.load(rows, loaded_weight, 0, self._projections[index], part)

    def _name(self, expert: int, projection: Projection) -> str:
        return f"{self._module}.{projection}_proj"
