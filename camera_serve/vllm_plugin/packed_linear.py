"""Shared experts with packed tiers in vLLM: linear layers that dequantize their own rows."""

from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

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


class _PackedMethod(LinearMethodBase):
    """One linear layer of a shared expert, its rows in `RankRows`, one for each projection.

    counts: `[1][tiers]` of the one shared MLP; module: `model.layers.3.mlp.shared_expert`.
    """

    projections: tuple[Projection, ...]

    def __init__(self, counts: TierCounts, tiers: Tiers, module: str) -> None:
        self._counts = counts
        self._tiers = tiers
        self._module = module
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
        d_model = output_size if self.projections == ("down",) else input_size
        split = split_layer(self._counts, tp_size=layer.tp_size, tp_rank=layer.tp_rank)
        self._loader = RowLoader(split, self._tiers, self._name, d_model, self.projections)
        for part, shape in RankRows.shapes(split.num_rows, self._tiers, d_model).items():
            full = (len(self.projections), *shape)
            empty = torch.empty(full, dtype=part_dtype(part, params_dtype))
            weight = Parameter(empty, requires_grad=False)
            set_weight_attrs(weight, {"weight_loader": partial(self._load, layer, part)})
            layer.register_parameter(part, weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse weights that never arrived; random weights are wanted for `dummy`."""
        if not weights_are_read():
            fill_dummy_grids(layer.scales)
        elif self._loader:
            self._loader.check_complete()

    def _multiply(self, layer: Any, x: torch.Tensor, projection: int, width: int) -> torch.Tensor:
        assert self._loader is not None
        parts = [getattr(layer, part)[projection] for part in PARTS]
        num_rows, bits = list(self._loader.split.num_rows), list(self._tiers.bits)
        down = self.projections == ("down",)
        return torch.ops.vllm.camera_packed_rows(x, parts, num_rows, bits, width, down)

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
        self._loader.load(rows, loaded_weight, 0, self.projections[index], part)

    def _name(self, expert: int, projection: Projection) -> str:
        return f"{self._module}.{projection}_proj"


class PackedGateUpMethod(_PackedMethod):
    """`gate_up_proj`: gate's activations, then up's."""

    projections = ("gate", "up")

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[num_tokens, d_model]` to `[num_tokens, 2 * width]`."""
        both = [self._multiply(layer, x, index, self._width) for index in (0, 1)]
        return torch.cat(both, dim=-1)


class PackedDownMethod(_PackedMethod):
    """`down_proj`, one micro-expert a row."""

    projections = ("down",)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[num_tokens, width]` to the rank's part of `[num_tokens, d_model]`."""
        return self._multiply(layer, x, 0, self._width)


def _packed_rows(
    x: torch.Tensor,
    parts: list[torch.Tensor],
    num_rows: list[int],
    bits: list[int],
    width: int,
    down: bool,
) -> torch.Tensor:
    tiers = RankRows(*parts).by_tier(num_rows, bits)
    weights = torch.cat([dense_rows(tier, slice(None), x.dtype) for tier in tiers])
    if down:
        return x[:, : len(weights)] @ weights
    out = x.new_zeros(len(x), width)
    out[:, : len(weights)] = x @ weights.T
    return out


def _packed_rows_shape(
    x: torch.Tensor,
    parts: list[torch.Tensor],
    num_rows: list[int],
    bits: list[int],
    width: int,
    down: bool,
) -> torch.Tensor:
    # Not `len(x)`: that would compile the graph for this one number of tokens.
    return x.new_empty(x.shape[0], parts[0].shape[1] if down else width)


# Opaque, so that torch.compile does not trace the unpacking of every tier.
direct_register_custom_op(
    op_name="camera_packed_rows", op_func=_packed_rows, fake_impl=_packed_rows_shape
)
