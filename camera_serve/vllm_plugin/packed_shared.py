"""Shared experts with packed tiers in vLLM: one MLP, computed by the routed experts' kernel.

vLLM computes it in three calls: `gate_up_proj`, SiLU·mul, `down_proj`; some families have a linear
layer for each of gate and up. The kernel takes packed rows as they are, but all three projections
at once. So the layer of the up projection is the whole MLP, and the others let its output through.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from camera_serve.checkpoint.format import PARTS, Part, Tiers
from camera_serve.models import Projection
from camera_serve.models.structure import PROJECTIONS
from camera_serve.vllm_plugin import choice
from camera_serve.vllm_plugin.compat import weights_are_read
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

_OPEN_GATE = 32.0
"""silu(32) is 32 in float32. A factor of 2^5 rounds nothing but, in float16, what is below 2^-9, by
2^-20 at most."""


class PackedSharedExpert:
    """The shared MLP of one layer, run by the kernel once its linear layers are loaded.

    counts: `[1][tiers]`; module: `model.layers.3.mlp.shared_expert`; `layers` are the linear layers
    that have it.
    """

    def __init__(self, counts: TierCounts, tiers: Tiers, module: str) -> None:
        self.counts = counts
        self.tiers = tiers
        self.module = module
        self.layers: set[str] = set()
        self._experts: Experts | None = None
        self._loaded: dict[Projection, RankRows] = {}

    def add(self, layer: LinearBase, rows: dict[Projection, RankRows], split: RankSplit) -> None:
        """Take the rows of one of the linear layers; with all of them, the kernel gets them.

        It holds them below `layer`, the last one, and there they stay when vLLM loads others.
        """
        self._loaded |= rows
        if len(self._loaded) < len(PROJECTIONS):
            return
        gate, up, down = (self._loaded.pop(projection) for projection in PROJECTIONS)
        whole = ragged_layer(gate, up, down, split, self.tiers.bits)
        like = cast(torch.Tensor, layer.weight)
        self._experts = install(
            layer, self._experts, lambda holder: choice.pack(holder, whole, like, top_k=1)
        )

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The rank's summand of the MLP's output, as x: `[num_tokens, d_model]`."""
        assert self._experts is not None
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
        return self._experts(x, torch.ones_like(ids, dtype=torch.float32), ids)


class PackedLinearMethod(LinearMethodBase):
    """One of the linear layers of a shared expert; projections: those it holds."""

    def __init__(self, expert: PackedSharedExpert, projections: tuple[Projection, ...]) -> None:
        self._expert = expert
        self.projections = projections
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
        d_model = output_size if "down" in self.projections else input_size
        counts, tiers = self._expert.counts, self._expert.tiers
        split = split_layer(counts, tp_size=layer.tp_size, tp_rank=layer.tp_rank)
        self._loader = RowLoader(split, tiers, self._name, d_model, self.projections)
        for part, shape in RankRows.shapes(split.num_rows, tiers, d_model).items():
            full = (len(self.projections), *shape)
            empty = torch.empty(full, dtype=part_dtype(part, params_dtype))
            expect(layer, part, empty, self._loading(part))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse weights that never arrived; random weights are wanted for `dummy`."""
        assert self._loader is not None
        if weights_are_read():
            self._loader.check_complete()
        else:
            fill_dummy_grids(layer.scales)
        rows = {name: _held(layer, index) for index, name in enumerate(self.projections)}
        self._expert.add(layer, rows, self._loader.split)
        release(layer, PARTS)

    def _loading(self, part: Part) -> Callable[..., None]:
        def load(
            layer: LinearBase,
            param: Parameter,
            loaded_weight: torch.Tensor,
            shard_id: int | None = None,
        ) -> None:
            assert self._loader is not None
            index = shard_id or 0
            bits = self._expert.tiers.bits
            rows = _held(layer, index).by_tier(self._loader.split.num_rows, bits)
            self._loader.load(rows, loaded_weight, 0, self.projections[index], part)

        return load

    def _name(self, expert: int, projection: Projection) -> str:
        return f"{self._expert.module}.{projection}_proj"


class PackedGateUpMethod(PackedLinearMethod):
    """`gate_up_proj`, or one of the two; the up projection computes the whole MLP."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[num_tokens, d_model]` of each projection: an open gate, the MLP's output behind it."""
        parts = {"gate": torch.full_like(x, _OPEN_GATE)}
        if "up" in self.projections:
            parts["up"] = self._expert.output(x) / _OPEN_GATE
        return torch.cat([parts[projection] for projection in self.projections], dim=-1)


class PackedDownMethod(PackedLinearMethod):
    """`down_proj`, which has nothing left to do."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: what SiLU·mul makes of `PackedGateUpMethod`'s, the output: `[num_tokens, d_model]`."""
        return x


def _held(layer: LinearBase, projection: int) -> RankRows:
    """The rows of one of a layer's projections, as views."""
    parts = (cast(Parameter, getattr(layer, part)).data[projection] for part in PARTS)
    return RankRows(*parts)
