"""The two linear layers of a packed shared expert, loaded and called as vLLM does it."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul

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
    """The two linear layers on one rank, ready to serve; `first`: which is loaded first."""

    def __init__(
        self,
        experts: Experts,
        dtype: torch.dtype = torch.float32,
        tp: tuple[int, int] = (1, 0),
        first: str = "gate_up_proj",
        without: str = "",
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
            self._load(experts, linear, dtype, without)

    def _load(self, experts: Experts, linear: str, dtype: torch.dtype, without: str) -> None:
        method, layer, width = self.methods[linear], self.layers[linear], experts.num_rows
        inputs, outputs = experts.d_model, [width, width]
        if linear == "down_proj":
            inputs, outputs = width, [experts.d_model]
        method.create_weights(layer, inputs, outputs, inputs, sum(outputs), dtype)
        for (_, shard, part), tensor in experts.tensors.items():
            if (shard == "w2") == (linear == "down_proj") and part != without:
                param = getattr(layer, part)
                param.weight_loader(param, tensor, SHARD_IDS[shard])
        method.process_weights_after_loading(layer)

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
