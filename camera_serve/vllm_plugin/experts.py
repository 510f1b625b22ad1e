"""What every kernel makes of a layer's experts: tensors held by the layer, and one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x `[num_tokens, d_model]`, top-k weights and global ids `[num_tokens, top_k]` -> the rank's
summand of the layer's output, new and of x's shape and dtype."""


def like_x(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """What every kernel's op returns, without values: for torch.compile."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def hold(layer: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Register weights of any dtype as a parameter: they move, and are counted, with the model."""
    held = Parameter(tensor, requires_grad=False)
    layer.register_parameter(f"camera_{name}", held)
    return held
