"""A layer's experts in vLLM: parameters that are loaded, what a kernel holds of them, one call."""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from camera_serve.errors import ServingError


class Experts(Protocol):
    """A kernel with a rank's weights of one layer, `weights`, as it reads them."""

    @property
    def weights(self) -> list[torch.Tensor]:
        """All that depends on the checkpoint's values, in a fixed order."""
        ...

    def __call__(
        self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor
    ) -> torch.Tensor:
        """The rank's summand of the layer's output, new and of x's shape and dtype.

        x: `[num_tokens, d_model]`; weights and global ids: `[num_tokens, top_k]`.
        """
        ...


def like_x(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """What every kernel's op returns, without values: for torch.compile."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def expect(layer: nn.Module, name: str, empty: torch.Tensor, load: Callable[..., Any]) -> None:
    """Register a parameter for vLLM to fill by `load(layer, param, tensor, …)`, a function.

    As a method of the layer, because vLLM keeps loaders for reloading, and of such a one it keeps
    no reference to the layer, which would never be freed.
    """
    weight = Parameter(empty, requires_grad=False)
    set_weight_attrs(weight, {"weight_loader": MethodType(load, layer)})
    layer.register_parameter(name, weight)


def release(layer: nn.Module, names: Iterable[str]) -> None:
    """Give up the loaded parameters that a kernel now holds in its own way, or as views."""
    for name in names:
        loaded = layer.get_parameter(name)
        loaded.data = loaded.data.new_empty(0)


def install(
    layer: nn.Module, running: Experts | None, pack: Callable[[nn.Module], Experts]
) -> Experts:
    """Let a kernel hold what was loaded, on a module of its own below `layer`: `pack` fills it.

    running: the layer's kernel, when vLLM loads weights into an engine that has some
    (`reload_weights`, sleep level 2). It gets the new ones where the old ones lie: captured CUDA
    graphs know these addresses.
    """
    holder = nn.Module()
    packed = pack(holder)
    if running is None:
        holder.register_state_dict_pre_hook(_refuse_saving)
        layer.add_module("camera", holder)
        return packed
    for held, fresh in zip(running.weights, packed.weights, strict=True):
        held.copy_(fresh)
    return running


def hold(holder: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Register weights of any dtype as a parameter: they move, and are counted, with the model."""
    held = Parameter(tensor, requires_grad=False)
    holder.register_parameter(name, held)
    return held


def _refuse_saving(holder: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise ServingError(
        f"{prefix.removesuffix('.camera.')}: a CAMERA checkpoint cannot be saved from a running "
        "engine (save_sharded_state): experts are held as a kernel reads them, which no load "
        "format takes. Copy the checkpoint's folder; it loads with any number of ranks"
    )
