"""Shared experts in vLLM: linear layers that allocate their own, narrower width."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from camera_serve.checkpoint.format import DENSE_TIERS
from camera_serve.errors import CheckpointError
from camera_serve.models import Projection
from camera_serve.vllm_plugin.compat import weights_are_read
from camera_serve.vllm_plugin.loading import RowLoader, TierCounts, padded_rows, split_layer


class _SharedExpertMethod(UnquantizedLinearMethod):
    """One linear layer of a shared expert.

    counts: `[tiers]` of the one shared MLP; module: `model.layers.3.mlp.shared_expert`;
    projections: those that the layer holds. Ranks whose share is smaller than the widest one's are
    padded with zeros, which add nothing.
    """

    def __init__(
        self, counts: TierCounts, module: str, projections: tuple[Projection, ...]
    ) -> None:
        super().__init__()
        if len(counts) != 1:
            raise CheckpointError(
                f"quantization_config counts {len(counts)} shared experts for {module}, wanted 1: "
                "all shared experts of a layer are one MLP"
            )
        self._counts = counts
        self._module = module
        self.projections = projections
        self._loader: RowLoader | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse weights that never arrived, then hand over to vLLM's own matrices."""
        if self._loader and weights_are_read():
            self._loader.check_complete()
        super().process_weights_after_loading(layer)

    def _prepare(self, layer: LinearBase, d_model: int) -> int:
        """Set up the loader; returns the width every rank allocates."""
        tp_size, tp_rank = layer.tp_size, layer.tp_rank
        split = split_layer(self._counts, tp_size=tp_size, tp_rank=tp_rank)
        self._loader = RowLoader(split, DENSE_TIERS, self._name, d_model, self.projections)
        return padded_rows(self._counts, tp_size)

    def _fill(self, rows: torch.Tensor, tensor: torch.Tensor, index: int = 0) -> None:
        """Copy the rank's rows of one of the projections; the padding below them is zero.

        vLLM reloads weights into fresh memory, not into what `create_weights` has zeroed.
        """
        assert self._loader is not None
        self._loader.load([rows], tensor, 0, self.projections[index])
        rows[sum(self._loader.split.num_rows) :].zero_()

    def _name(self, expert: int, projection: Projection) -> str:
        return f"{self._module}.{projection}_proj"


class SharedGateUpMethod(_SharedExpertMethod):
    """`gate_up_proj`: gate rows, then up rows; or one of the two."""

    def create_weights(
        self,
        layer: ColumnParallelLinear,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate `[projections * width, d_model]` of zeros and tell the layer its new sizes."""
        width, count = self._prepare(layer, input_size), len(self.projections)
        layer.output_sizes = [width * layer.tp_size] * count
        layer.output_size = sum(layer.output_sizes)
        layer.output_partition_sizes = [width] * count
        layer.output_size_per_partition = count * width
        super().create_weights(
            layer,
            input_size_per_partition,
            layer.output_partition_sizes,
            input_size,
            layer.output_size,
            params_dtype,
            weight_loader=self._load,
        )
        layer.weight.data.zero_()

    def _load(
        self, param: Parameter, loaded_weight: torch.Tensor, shard_id: int | None = None
    ) -> None:
        index = shard_id or 0
        rows = param.data.unflatten(0, (len(self.projections), -1))[index]
        self._fill(rows, loaded_weight, index)


class SharedDownMethod(_SharedExpertMethod):
    """`down_proj`, stored as vLLM has it: `[d_model, width]`."""

    def create_weights(
        self,
        layer: RowParallelLinear,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate `[d_model, width]` of zeros and tell the layer its new sizes."""
        width = self._prepare(layer, output_size)
        layer.input_size = width * layer.tp_size
        layer.input_size_per_partition = width
        super().create_weights(
            layer,
            width,
            output_partition_sizes,
            layer.input_size,
            output_size,
            params_dtype,
            weight_loader=self._load,
        )
        layer.weight.data.zero_()

    def _load(
        self, param: Parameter, loaded_weight: torch.Tensor, shard_id: int | None = None
    ) -> None:
        self._fill(param.data.t(), loaded_weight)
