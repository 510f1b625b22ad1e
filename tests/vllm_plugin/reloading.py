"""A layer of a running engine, and vLLM's own way to give it other weights."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.vllm_plugin.experts import Experts, make_layer


def running(experts: Experts, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, nn.Module]:
    """A loaded layer, after its method and before the model that vLLM knows it by."""
    method, layer = make_layer(experts, dtype=dtype)
    model = nn.Module()
    model.add_module("experts", layer)
    record_metadata_for_reloading(model)
    experts.load(layer)
    method.process_weights_after_loading(layer)
    return method, layer, model


def reload(experts: Experts, layer: Any, model: nn.Module) -> None:
    """Load other weights of the same layout, as `reload_weights` does."""
    initialize_layerwise_reload(model)
    experts.load(layer)
    finalize_layerwise_reload(model, None)


def addresses(model: nn.Module) -> dict[str, int]:
    """Where every weight lies."""
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}
