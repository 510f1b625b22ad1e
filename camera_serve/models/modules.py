"""Where transformers' own model of a config has its experts, and whether they compute SwiGLU.

What a config says of the activation is not enough: some families clamp, add a bias or interleave
under `hidden_act: silu`. So a small copy of the module is run, and compared.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from camera_serve.errors import UnsupportedModelError, described

_EXPERTS = re.compile(r"((?:.+\.)?layers)\.(\d+)\.(\w+)\.experts")
_TRIED_D_MODEL, _TRIED_D_FF = 8, 6
_TRIED_SIZES = (0.01, 1.0, 100.0)
"""Sizes of the inputs tried: clamps of activations are known from 7 to some tens."""


@dataclass(frozen=True)
class MoeModules:
    """The experts of a model on the meta device.

    `layers_name` is where the decoder layers lie (`model.layers`), `embedding_name` what gives them
    their tokens (`model.embed_tokens`), `moe_name` what a layer calls its MoE block, `shared_name`
    and `shared_gate_name` what that calls its shared expert and the gate of it (empty: none).
    """

    layers_name: str
    embedding_name: str
    moe_layers: tuple[int, ...]
    moe_name: str
    num_experts: int
    d_ff: int
    shared_name: str = ""
    shared_gate_name: str = ""
    shared_d_ff: int = 0


def find_moe(model: nn.Module, d_model: int) -> MoeModules | None:
    """The MoE layers of a model on the meta device; None for a dense model.

    Raises `UnsupportedModelError` for experts that differ from layer to layer, that are more than
    SwiGLU, or that lie in more than one stack of layers.
    """
    found = list(_experts(model))
    if not found:
        return None
    layers_name, _, moe_name, first = found[0]
    moe = _block(model.get_submodule(first), first, d_model)
    for stack, _, name, where in found:
        other = _block(model.get_submodule(where), where, d_model)
        if (stack, name, other) != (layers_name, moe_name, moe):
            raise UnsupportedModelError(
                f"{where} ({other}) differs from {first} ({moe}): wanted all MoE layers alike"
            )
        # Each, as limits may be set by layer.
        _try_block(model.get_submodule(where), where, moe.shared_name)
    return MoeModules(
        layers_name,
        _embedding_name(model, layers_name),
        tuple(layer for _, layer, _, _ in found),
        moe_name,
        **asdict(moe),
    )


def layer_stack(model: nn.Module, moe: MoeModules) -> Any:
    """The module that owns the decoder layers, in a model of any head or none.

    Its name is not always `layers_name`: AutoModel leaves off the base model's, and
    AutoModelForCausalLM may make the text part of a larger model alone.
    """
    for name, module in model.named_modules():
        # What sees pictures has layers as well.
        layers = module if isinstance(module, nn.ModuleList) else ()
        blocks = [getattr(layer, moe.moe_name, None) for layer in layers]
        if f".{name}".endswith(".layers") and any(hasattr(block, "experts") for block in blocks):
            return model.get_submodule(name.rpartition(".")[0])
    raise UnsupportedModelError(f"{type(model).__name__} has no layers with {moe.moe_name}.experts")


def _embedding_name(model: nn.Module, layers_name: str) -> str:
    stack = model.get_submodule(layers_name.rpartition(".")[0])
    embedding = stack.get_input_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is embedding)


@dataclass(frozen=True)
class _Block:
    """What a MoE layer consists of; `MoeModules` says what the fields mean."""

    num_experts: int
    d_ff: int
    shared_name: str
    shared_gate_name: str
    shared_d_ff: int

    def __str__(self) -> str:
        shared = f", {self.shared_name} of {self.shared_d_ff}" if self.shared_name else ""
        return f"{self.num_experts} experts of d_ff {self.d_ff}{shared}"


def _block(moe: nn.Module, where: str, d_model: int) -> _Block:
    sizes = _sizes(moe.get_submodule("experts"), where, d_model)
    shared, gate = _shared(moe, where)
    return _Block(*sizes, shared, gate, _width(moe.get_submodule(shared)) if shared else 0)


def _try_block(moe: nn.Module, where: str, shared_name: str) -> None:
    # transformers describes models while it builds them, with another default device.
    with torch.device("cpu"):
        _try_experts(moe.get_submodule("experts"), where)
        if shared_name:
            _try_shared(moe.get_submodule(shared_name), f"{where}.{shared_name}")


def _experts(model: nn.Module) -> Iterator[tuple[str, int, str, str]]:
    """Each MoE block with routed experts: stack, layer, name in the layer, full name."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts" or all(w.ndim != 3 for w in module.parameters()):
            continue
        match = _EXPERTS.fullmatch(name)
        if not match:
            raise UnsupportedModelError(
                f"the experts {name} are not in a block of a decoder layer: wanted them under a "
                "name like model.layers.0.mlp.experts"
            )
        yield match[1], int(match[2]), match[3], name.rpartition(".")[0]


def _sizes(experts: nn.Module, where: str, d_model: int) -> tuple[int, int]:
    """`num_experts`, `d_ff` of a module `gate_up_proj [E, 2 * d_ff, d_model]`, or transposed."""
    shapes = {name: tuple(weight.shape) for name, weight in experts.named_parameters()}
    if set(shapes) == {"gate_up_proj", "down_proj"}:
        (count, *both), (as_many, *down) = shapes["gate_up_proj"], shapes["down_proj"]
        if getattr(experts, "is_transposed", False):
            both, down = both[::-1], down[::-1]
        d_ff = down[-1]
        if (as_many, both, down) == (count, [2 * d_ff, d_model], [d_model, d_ff]):
            return count, d_ff
    raise UnsupportedModelError(
        f"the experts of {where} hold {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}: "
        "wanted gate_up_proj [number, 2 * d_ff, d_model] and down_proj [number, d_model, d_ff] "
        "alone, without a bias"
    )


def _shared(moe: nn.Module, where: str) -> tuple[str, str]:
    """What a MoE block calls its shared expert and the expert's gate; empty where it has none."""
    children = dict(moe.named_children())
    shared = [name for name, child in children.items() if hasattr(child, "gate_proj")]
    gates = [
        name
        for name, child in children.items()
        if isinstance(child, nn.Linear) and child.out_features == 1
    ]
    if len(shared) > 1 or len(gates) > len(shared):
        raise UnsupportedModelError(
            f"{where} has the dense parts {', '.join(shared + gates)}: wanted one shared expert, "
            "and one gate for it at most"
        )
    return "".join(shared), "".join(gates)


def _width(shared: nn.Module) -> int:
    return int(shared.get_submodule("gate_proj").out_features)  # type: ignore[arg-type]


@torch.no_grad()
def _try_experts(experts: nn.Module, where: str) -> None:
    """Run two small experts in place of the module's own; raises `UnsupportedModelError`."""
    draw = _draws()
    gate_up, down = draw(2, 2 * _TRIED_D_FF, _TRIED_D_MODEL), draw(2, _TRIED_D_MODEL, _TRIED_D_FF)
    turned = bool(getattr(experts, "is_transposed", False))
    small = _copy(experts)
    small._parameters = {
        "gate_up_proj": nn.Parameter(gate_up.mT.contiguous() if turned else gate_up),
        "down_proj": nn.Parameter(down.mT.contiguous() if turned else down),
    }
    small.num_experts = 2
    x = _inputs(draw)
    ids, weights = torch.tensor([[0, 1]] * len(x)), torch.tensor([[0.25, 0.75]] * len(x)).double()
    wanted = torch.zeros_like(x)
    for expert in (0, 1):
        gate, up = gate_up[expert].split(_TRIED_D_FF)
        wanted += weights[:, expert, None] * _swiglu(x, gate, up, down[expert])
    _compare(small, (x, ids, weights), wanted, f"{where}.experts")


@torch.no_grad()
def _try_shared(shared: nn.Module, where: str) -> None:
    """Run a small shared expert in place of the module's own; raises `UnsupportedModelError`."""
    small = _copy(shared)
    small._modules = dict(shared._modules)
    draw = _draws()
    gate, up = draw(2, _TRIED_D_FF, _TRIED_D_MODEL)
    weights = {"gate_proj": gate, "up_proj": up, "down_proj": draw(_TRIED_D_MODEL, _TRIED_D_FF)}
    for name, weight in weights.items():
        if getattr(shared.get_submodule(name), "bias", None) is not None:
            raise UnsupportedModelError(f"{where}.{name} has a bias: wanted none")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        small._modules[name] = linear
    x = _inputs(draw)
    _compare(small, (x,), _swiglu(x, gate, up, weights["down_proj"]), where)


def _copy(module: nn.Module) -> Any:
    """A copy whose parameters and children can be replaced, computed by the module's own loop."""
    small: Any = copy.copy(module)
    if hasattr(small, "config"):
        small.config = copy.deepcopy(small.config)
        small.config._experts_implementation = "eager"
    return small


def _compare(module: nn.Module, inputs: tuple[torch.Tensor, ...], wanted: Any, where: str) -> None:
    try:
        found = module(*inputs)
    except Exception as error:
        raise UnsupportedModelError(
            f"{where} is no SwiGLU that can be tried alone: {described(error)}"
        ) from error
    # By token, as sizes differ. A cast to float32 inside the module is no other function.
    close = (found.double() - wanted).abs() <= 1e-4 * wanted.abs().amax(-1, keepdim=True)
    if not close.all():
        raise UnsupportedModelError(
            f"{where} computes something else than silu(gate) * up (an activation of another kind, "
            "a limit or a bias): not supported"
        )


def _swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _inputs(draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Float64 `[num_tokens, d_model]`, small and large."""
    return torch.cat([size * draw(4, _TRIED_D_MODEL) for size in _TRIED_SIZES])


def _draws() -> Callable[..., torch.Tensor]:
    """Random float64 tensors of any shape, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
