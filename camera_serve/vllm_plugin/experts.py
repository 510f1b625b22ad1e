"""A layer's experts in vLLM: parameters that are loaded, what a kernel holds of them, one call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x `[num_tokens, d_model]`, top-k weights and global ids `[num_tokens, top_k]` -> the rank's
summand of the layer's output, new and of x's shape and dtype."""


def like_x(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """What every kernel's op returns, without values: for torch.compile."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def expect(layer: nn.Module, name: str, empty: torch.Tensor, load: Callable[..., Any]) -> None:
    """Register a parameter for vLLM to fill by `load(param, tensor, …)`."""
    weight = Parameter(empty, requires_grad=False)
    set_weight_attrs(weight, {"weight_loader": load})
    layer.register_parameter(name, weight)


def release(layer: nn.Module, names: Iterable[str]) -> None:
    """Give up the loaded parameters that a kernel now holds in its own way, or as views."""
    for name in names:
        loaded = layer.get_parameter(name)
        loaded.data = loaded.data.new_empty(0)


def hold(layer: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Register weights of any dtype as a parameter: they move, and are counted, with the model."""
    held = Parameter(tensor, requires_grad=False)
    layer.register_parameter(f"camera_{name}", held)
    return held
