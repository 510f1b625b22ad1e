"""The two linear layers of a packed shared expert, loaded and called as vLLM does it."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from camera_serve.vllm_plugin.packed_shared import (
    PackedDownMethod,
    PackedGateUpMethod,
    PackedLinearMethod,
    PackedSharedExpert,
)
from tests.e2e.engine import held_tensors
from tests.vllm_plugin.experts import Experts

SHARD_IDS = {"w1": 0, "w3": 1, "w2": None}


class Mlp:
    """The two linear layers on one rank, ready to serve.

    first: which is loaded first; model: who holds the layers, for a test of reloading.
    """

    def __init__(
        self,
        experts: Experts,
        dtype: torch.dtype = torch.float32,
        tp: tuple[int, int] = (1, 0),
        first: str = "gate_up_proj",
        without: str = "",
        model: nn.Module | None = None,
    ) -> None:
        self.layers: dict[str, Any] = {}
        shared = PackedSharedExpert(experts.counts, experts.tiers, "mlp.shared_expert")
        self.methods: dict[str, PackedLinearMethod] = {
            "gate_up_proj": PackedGateUpMethod(shared),
            "down_proj": PackedDownMethod(shared),
        }
        self.act = SiluAndMul()
        for linear in sorted(self.methods, reverse=first == "gate_up_proj"):
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
        inputs, outputs = experts.d_model, [experts.num_rows] * 2
        if linear == "down_proj":
            inputs, outputs = experts.num_rows, [experts.d_model]
        method, layer = self.methods[linear], self.layers[linear]
        method.create_weights(layer, inputs, outputs, inputs, sum(outputs), dtype)

    def load(self, experts: Experts, linear: str, without: str = "") -> None:
        """Call the loaders of one of the layers; `without`: a part that never comes."""
        for (_, shard, part), tensor in experts.tensors.items():
            if (shard == "w2") == (linear == "down_proj") and part != without:
                param = getattr(self.layers[linear], part)
                param.weight_loader(param, tensor, SHARD_IDS[shard])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.methods["gate_up_proj"].apply(self.layers["gate_up_proj"], x)
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
