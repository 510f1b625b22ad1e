"""The linear layers of a packed shared expert, loaded and called as vLLM does it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from camera_serve.models import Projection
from camera_serve.vllm_plugin.packed_shared import (
    PackedDownMethod,
    PackedGateUpMethod,
    PackedLinearMethod,
    PackedSharedExpert,
)
from tests.e2e.engine import held_tensors
from tests.vllm_plugin.experts import Experts

MERGED = ("gate_up_proj", "down_proj")
SEPARATE = ("gate_proj", "up_proj", "down_proj")
_PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
}
_SHARDS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}


class Mlp:
    """The linear layers on one rank, ready to serve.

    first: which is loaded first, the last of them where it is not `down_proj`; model: who holds the
    layers, for a test of reloading.
    """

    def __init__(
        self,
        experts: Experts,
        dtype: torch.dtype = torch.float32,
        tp: tuple[int, int] = (1, 0),
        first: str = "gate_up_proj",
        without: str = "",
        model: nn.Module | None = None,
        linears: Sequence[str] = MERGED,
    ) -> None:
        self.layers: dict[str, Any] = {}
        shared = PackedSharedExpert(experts.counts, experts.tiers, "mlp.shared_expert")
        self.methods: dict[str, PackedLinearMethod] = {
            linear: (PackedDownMethod if linear == "down_proj" else PackedGateUpMethod)(
                shared, _PROJECTIONS[linear]
            )
            for linear in linears
        }
        self.act = SiluAndMul()
        for linear in sorted(self.methods, reverse=first != "down_proj"):
            layer = self.layers[linear] = nn.Module()
            layer.tp_size, layer.tp_rank = tp  # type: ignore[assignment]
            layer.quant_method = self.methods[linear]  # type: ignore[assignment]
            self._create(experts, linear, dtype)
            if model is not None:
                model.add_module(linear, layer)
                record_metadata_for_reloading(layer)
            self.load(experts, linear, without)
            self.methods[linear].process_weights_after_loading(layer)

    def _create(self, experts: Experts, linear: str, dtype: torch.dtype) -> None:
        inputs, outputs = experts.d_model, [experts.num_rows] * len(_PROJECTIONS[linear])
        if linear == "down_proj":
            inputs, outputs = experts.num_rows, [experts.d_model]
        method, layer = self.methods[linear], self.layers[linear]
        method.create_weights(layer, inputs, outputs, inputs, sum(outputs), dtype)

    def load(self, experts: Experts, linear: str, without: str = "") -> None:
        """Call the loaders of one of the layers; `without`: a part that never comes."""
        projections = _PROJECTIONS[linear]
        for (_, shard, part), tensor in experts.tensors.items():
            if _SHARDS[shard] in projections and part != without:
                param = getattr(self.layers[linear], part)
                index = projections.index(_SHARDS[shard])
                param.weight_loader(param, tensor, *([index] if len(projections) > 1 else []))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        *first, _ = self.methods
        outputs = [self.methods[linear].apply(self.layers[linear], x) for linear in first]
        gate_up = torch.cat(outputs, dim=-1)
        return self.methods["down_proj"].apply(self.layers["down_proj"], self.act(gate_up))

    @property
    def num_bytes(self) -> int:
        owners = [*(vars(layer) for layer in self.layers.values()), *self.methods.values()]
        storages = [tensor.untyped_storage() for tensor in held_tensors(owners)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def exact(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """The one expert's output of every token, in float64."""
    num_tokens = len(x)
    ids = torch.zeros(num_tokens, 1, dtype=torch.int32)
    return experts.output(x, torch.ones(num_tokens, 1), ids, range(1))
