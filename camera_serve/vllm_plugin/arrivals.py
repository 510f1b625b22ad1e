"""Weights of vLLM's model that nothing in a checkpoint fills: it would compute with anything."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from camera_serve.errors import ServingError


def require_filled(method: QuantizeMethodBase, served: str) -> None:
    """Let a layer's method raise `ServingError` once loaded, if a part of a weight never arrived.

    served: what vLLM calls the layer. What is allocated starts as NaN, which no loader leaves.
    """
    create, process = method.create_weights, method.process_weights_after_loading

    def create_empty(layer: nn.Module, *arguments: Any, **keywords: Any) -> None:
        create(layer, *arguments, **keywords)
        for weight in layer.parameters(recurse=False):
            if weight.is_floating_point():
                weight.data.fill_(torch.nan)

    def process_filled(layer: nn.Module) -> None:
        for name, weight in layer.named_parameters(recurse=False):
            if not weight.is_meta and bool(weight.data.sum().isnan()):
                raise ServingError(
                    f"{served}.{name} of vLLM's model is not filled by any tensor of the "
                    "checkpoint, or holds NaN: the answers would be another model's. If `verify` "
                    "finds the checkpoint whole, use transformers (`import camera_serve.hf`)"
                )
        process(layer)

    method.create_weights = create_empty
    method.process_weights_after_loading = process_filled
