"""What the plugin takes for granted about vLLM, checked where vLLM is newer than any it was tested
with: names, what ours are called with, what ours call, and a small layer's output."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from camera_serve.ragged.layer import RaggedLayer, RaggedTier, ragged_moe
from camera_serve.signatures import fits

_LAYERS = "vllm.model_executor.layers"
_FUSED_MOE = f"{_LAYERS}.fused_moe"

NAMES = {
    f"{_FUSED_MOE}.activation": ("MoEActivation.SILU",),
    f"{_FUSED_MOE}.config": ("FusedMoEConfig", "FusedMoEParallelConfig"),
    f"{_FUSED_MOE}.fused_moe_method_base": ("FusedMoEMethodBase",),
    f"{_FUSED_MOE}.routed_experts": ("RoutedExperts._map_global_expert_id_to_local_expert_id",),
    f"{_LAYERS}.linear": (
        *("LinearBase", "LinearMethodBase", "MergedColumnParallelLinear", "RowParallelLinear"),
        "UnquantizedLinearMethod",
    ),
    f"{_LAYERS}.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
    "vllm.config": ("CUDAGraphMode.NONE", "get_current_vllm_config"),
    "vllm.logger": ("init_logger",),
    "vllm.model_executor.utils": ("set_weight_attrs",),
    "vllm.platforms": ("current_platform",),
    "vllm.transformers_utils.config": ("get_safetensors_params_metadata",),
    "vllm.utils.torch_utils": ("direct_register_custom_op",),
}
"""By module, what must be there."""

READ = {
    f"{_FUSED_MOE}.routed_experts:RoutedExperts": (
        *("activation", "apply_router_weight_on_input", "global_num_experts", "moe_config"),
    ),
    f"{_FUSED_MOE}.config:FusedMoEConfig": (
        *("tp_size", "tp_rank", "moe_parallel_config", "in_dtype", "experts_per_token"),
    ),
    f"{_FUSED_MOE}.config:FusedMoEParallelConfig": ("enable_eplb",),
    f"{_LAYERS}.linear:LinearBase": ("tp_size", "tp_rank"),
    f"{_LAYERS}.linear:MergedColumnParallelLinear": ("output_sizes",),
}
"""By class, what of its instances is read: its code must set or define it."""

CALLED = {
    "vllm.model_executor.utils:set_weight_attrs": ("weight", "weight_attrs"),
    "vllm.transformers_utils.config:get_safetensors_params_metadata": ("model", "revision"),
    "vllm.utils.torch_utils:direct_register_custom_op": ("op_name", "op_func", "fake_impl"),
    f"{_LAYERS}.linear:UnquantizedLinearMethod.create_weights": (
        *("self", "layer", "input_size_per_partition", "output_partition_sizes", "input_size"),
        *("output_size", "params_dtype"),
    ),
    f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase.__init__": ("self", "moe"),
}
"""By function, the arguments it is given, in their order; it may have more with defaults."""

TOLERANCE = 1e-5


def broken_items() -> Iterator[str]:
    """What of the contract does not hold, in words; nothing when all of it does."""
    broken = [*_missing_names(), *_unread(), *_uncalled()]
    yield from broken
    if not broken:
        yield from _misfits()


def small_layer_error() -> float:
    """How far a small layer's output through the plugin's method is from plain torch's."""
    from camera_serve.checkpoint.format import DENSE_TIERS
    from camera_serve.vllm_plugin.moe import CameraMoEMethod

    counts, d_model = ((3,), (0,), (5,)), 32
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(8, d_model, generator=generator) for _ in range(3))
    rows = {"w1": gate, "w3": up, "w2": down}
    offsets = (0, 3, 3, 8)
    method = CameraMoEMethod(_moe_config(), counts, DENSE_TIERS, "layers.0.mlp", _name)
    layer = _layer(len(counts))
    method.create_weights(
        layer,
        num_experts=len(counts),
        hidden_size=d_model,
        intermediate_size_per_partition=8,
        params_dtype=torch.float32,
        weight_loader=None,
        global_num_experts=len(counts),
    )
    for expert, shard in product((0, 2), rows):
        tensor = rows[shard][offsets[expert] : offsets[expert + 1]]
        attribute = "w2_weight" if shard == "w2" else "w13_weight"
        load = getattr(layer, attribute).weight_loader
        given = tensor.T if shard == "w2" else tensor
        load(getattr(layer, attribute), given, attribute, shard_id=shard, expert_id=expert)
    method.process_weights_after_loading(layer)
    x = torch.randn(4, d_model, generator=generator)
    weights = torch.rand(4, 2, generator=generator)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0]], dtype=torch.int32)
    found = method.apply(layer, x, weights, ids, None, None)
    tier = RaggedTier(gate, up, down, offsets)
    wanted = ragged_moe(x, weights, ids, RaggedLayer((tier,)))
    return float((found - wanted).norm() / wanted.norm())


def _missing_names() -> Iterator[str]:
    for module, names in NAMES.items():
        for name in names:
            if _find(module, name) is None:
                yield f"{module} has no {name}"


def _unread() -> Iterator[str]:
    for place, attributes in READ.items():
        found = _find(*place.split(":"))
        known = _code_of(found) if inspect.isclass(found) else ""
        for attribute in attributes:
            if found is not None and attribute not in known:
                yield f"{place.replace(':', '.')} knows no {attribute}"


def _code_of(found: type) -> str:
    classes = [c for c in found.__mro__ if c.__module__.startswith("vllm")]
    return "\n".join(inspect.getsource(one) for one in classes)


def _uncalled() -> Iterator[str]:
    for place, arguments in CALLED.items():
        function = _find(*place.split(":"))
        if function is None:
            yield f"{place.replace(':', '.')} is missing"
            continue
        signature = inspect.signature(function)
        try:
            signature.bind(**dict.fromkeys(arguments))
        except TypeError as error:
            yield f"{place.replace(':', '.')}{signature} does not take what it is given ({error})"


def _misfits() -> Iterator[str]:
    """Methods of ours that vLLM would call with arguments they do not take."""
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from camera_serve.vllm_plugin.config import CameraConfig
    from camera_serve.vllm_plugin.moe import CameraMoEMethod

    for ours, base in ((CameraConfig, QuantizationConfig), (CameraMoEMethod, FusedMoEMethodBase)):
        if abstract := sorted(getattr(ours, "__abstractmethods__", ())):
            yield f"{base.__name__} wants {', '.join(abstract)}"
        for name in _overridden(ours, base):
            if not fits(_as_called(ours, name), _as_called(base, name)):
                yield f"{base.__name__} calls {name}{inspect.signature(getattr(base, name))}"


def _overridden(ours: type, base: type) -> Iterator[str]:
    for name in dir(base):
        method = getattr(ours, name)
        is_ours = inspect.isroutine(method) and method is not getattr(base, name)
        if is_ours and not name.startswith("__"):
            yield name


def _as_called(owner: type, name: str) -> Callable[..., Any]:
    """A method without its first argument, whether that is an instance or the class."""
    raw = inspect.getattr_static(owner, name)
    if isinstance(raw, staticmethod):
        return raw.__func__
    return partial(getattr(raw, "__func__", raw), None)


def _find(module: str, name: str) -> Any:
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _moe_config() -> Any:
    return SimpleNamespace(
        tp_size=1,
        tp_rank=0,
        moe_parallel_config=SimpleNamespace(enable_eplb=False),
        in_dtype=torch.float32,
        experts_per_token=2,
    )


def _layer(num_experts: int) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer: Any = nn.Module()
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.global_num_experts = num_experts
    layer._map_global_expert_id_to_local_expert_id = partial(int)
    return layer


def _name(expert: int, projection: str) -> str:
    return f"layers.0.mlp.experts.{expert}.{projection}_proj"
