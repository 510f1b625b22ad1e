"""What the plugin relies on in vLLM, written once, and whether a given vLLM still has it.

With the tested versions it is known to hold. A newer one is checked when a CAMERA checkpoint is
opened: it goes on with a warning where all of this holds, and stops where something changed.
"""

import inspect
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from camera_serve.errors import ServingError

OLDEST, NEWEST = (0, 26), (0, 33)
"""The oldest vLLM that has what is needed, and the newest one this was tested with."""

_LAYERS = "vllm.model_executor.layers"
_CONFIG = "vllm.config:VllmConfig"
_EXPERTS = f"{_LAYERS}.fused_moe.routed_experts:RoutedExperts"
_QUANTIZATION = f"{_LAYERS}.quantization.base_config:QuantizationConfig"
_MOE = f"{_LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase"
_LINEAR = f"{_LAYERS}.linear:LinearMethodBase"
_PLUGIN = "camera_serve.vllm_plugin"
_LINEAR_HOOKS = ("create_weights", "apply", "process_weights_after_loading")

HOOKS: dict[tuple[str, str], tuple[str, ...]] = {
    (_QUANTIZATION, f"{_PLUGIN}.config:CameraConfig"): (
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
        "from_config",
        "override_quantization_method",
        "maybe_update_config",
        "apply_vllm_mapper",
        "get_quant_method",
    ),
    (_MOE, f"{_PLUGIN}.moe:CameraMoEMethod"): (
        "create_weights",
        "maybe_roundup_sizes",
        "get_fused_moe_quant_config",
        "process_weights_after_loading",
        "apply",
    ),
    (_LINEAR, f"{_PLUGIN}.linear:SharedGateUpMethod"): _LINEAR_HOOKS,
    (_LINEAR, f"{_PLUGIN}.linear:SharedDownMethod"): _LINEAR_HOOKS,
    (_LINEAR, f"{_PLUGIN}.packed_shared:PackedGateUpMethod"): _LINEAR_HOOKS,
    (_LINEAR, f"{_PLUGIN}.packed_shared:PackedDownMethod"): _LINEAR_HOOKS,
}
"""vLLM's class, ours, and what vLLM calls of ours in the way its own class says."""

CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    f"{_MOE}.__init__": (2, ()),
    "vllm.config:get_current_vllm_config": (0, ()),
    "vllm.model_executor.utils:set_weight_attrs": (2, ()),
    "vllm.transformers_utils.config:get_safetensors_params_metadata": (1, ("revision",)),
    "vllm.utils.torch_utils:direct_register_custom_op": (0, ("op_name", "op_func", "fake_impl")),
    f"{_LAYERS}.quantization:register_quantization_config": (1, ()),
    f"{_LAYERS}.quantization.fp8:Fp8Config": (
        0,
        ("is_checkpoint_fp8_serialized", "activation_scheme", "weight_block_size"),
    ),
    f"{_LAYERS}.quantization.fp8:Fp8Config.get_quant_method": (3, ()),
    f"{_EXPERTS}._map_global_expert_id_to_local_expert_id": (2, ()),
}
"""What we call of vLLM's: how many arguments by position, self included, and which by name."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    f"{_EXPERTS}.weight_loader": (
        "self",
        "param",
        "loaded_weight",
        "weight_name",
        "shard_id",
        "expert_id",
        "return_success",
    ),
    f"{_LAYERS}.linear:MergedColumnParallelLinear.weight_loader": (
        "self",
        "param",
        "loaded_weight",
        "loaded_shard_id",
    ),
    f"{_LAYERS}.linear:ColumnParallelLinear.weight_loader": ("self", "param", "loaded_weight"),
    f"{_LAYERS}.linear:RowParallelLinear.weight_loader": ("self", "param", "loaded_weight"),
}
"""Functions of vLLM's that its models call, and in whose place ours stand: exactly these."""

MEMBERS: dict[str, tuple[str, ...]] = {
    _CONFIG: (
        "compilation_config",
        "kernel_config",
        "load_config",
        "lora_config",
        "model_config",
        "offload_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "weight_transfer_config",
    ),
    "vllm.config:CompilationConfig": ("cudagraph_mode",),
    "vllm.config:CUDAGraphMode": ("NONE",),
    "vllm.config:KernelConfig": ("moe_backend",),
    "vllm.config:LoadConfig": ("load_format",),
    "vllm.config:ModelConfig": ("dtype", "model", "quantization_config"),
    "vllm.config:OffloadConfig": ("uva", "prefetch"),
    "vllm.config:ParallelConfig": ("all2all_backend", "data_parallel_size", "enable_eplb"),
    "vllm.config:SchedulerConfig": ("max_num_batched_tokens",),
    "vllm.config:SpeculativeConfig": ("draft_model_config",),
    f"{_LAYERS}.fused_moe.activation:MoEActivation": ("SILU",),
    f"{_LAYERS}.fused_moe.config:FusedMoEConfig": (
        "experts_per_token",
        "has_bias",
        "tp_rank",
        "tp_size",
    ),
    f"{_LAYERS}.linear:UnquantizedLinearMethod": (
        "create_weights",
        "process_weights_after_loading",
    ),
    f"{_LAYERS}.vocab_parallel_embedding:ParallelLMHead": ("weight_loader",),
    f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod": (
        "create_weights",
        "process_weights_after_loading",
    ),
    _MOE: ("is_monolithic",),
    "vllm.platforms:current_platform": ("is_cpu", "is_cuda", "is_cuda_alike"),
}
"""What is read of vLLM's classes: fields, members of an enumeration, attributes, methods."""

LAYER_ATTRIBUTES = (
    "activation",
    "apply_router_weight_on_input",
    "global_num_experts",
    "moe_config",
)
"""What is read of a MoE layer as vLLM has built it."""

_logger = logging.getLogger(__name__)


def require(version: str) -> None:
    """Raise `ServingError` naming what changed in an untested vLLM; warn where nothing did."""
    if not is_untested(version):
        return
    if found := changes():
        raise ServingError(refusal(version, found))
    _logger.warning(
        "vLLM %s is newer than %s, the newest that camera-serve was tested with. What it relies on "
        "is as it was, so it goes on; if answers look wrong, compare them with those of %s",
        version,
        _text(NEWEST),
        _install(),
    )


def is_untested(version: str) -> bool:
    """Whether this vLLM is newer than the tested ones, or does not say what it is."""
    number = _number(version)
    return number is None or number > NEWEST


def too_old(version: str) -> str | None:
    """Why this vLLM cannot serve CAMERA checkpoints at all; None when it is not too old."""
    number = _number(version)
    if number is None or number >= OLDEST:
        return None
    return (
        f"CAMERA checkpoints are served by vLLM {_text(OLDEST)} and newer, and this is vLLM "
        f"{version}: pip install 'vllm>={_text(OLDEST)}'"
    )


def refusal(version: str, found: list[str]) -> str:
    """What to say about a vLLM in which the plugin no longer finds its way."""
    return (
        f"this vLLM, {version}, is not one that camera-serve knows (tested: {_text(OLDEST)} to "
        f"{_text(NEWEST)}): {'; '.join(found)}. Upgrade camera-serve, or pip install {_install()}"
    )


def changes() -> list[str]:
    """Everything that is not as the plugin needs it, one sentence each; empty when it holds."""
    return [*_changed_hooks(), *_changed_calls(), *_changed_parameters(), *_lost_members()]


def require_attributes(layer: Any, name: str) -> None:
    """Raise `ServingError` for a MoE layer that lacks what is read of it."""
    if lost := [attribute for attribute in LAYER_ATTRIBUTES if not hasattr(layer, attribute)]:
        raise ServingError(
            f"{name}: vLLM's MoE layer has lost {', '.join(lost)}: pip install {_install()}"
        )


def _changed_hooks() -> Iterator[str]:
    for (theirs, ours), names in HOOKS.items():
        mine = _find(ours)
        if abstract := getattr(mine, "__abstractmethods__", None):
            yield f"{theirs} wants {', '.join(sorted(abstract))}"
        for name in names:
            try:
                called_with = _fixed(_on_an_instance(_find(theirs), name))
                _bind(_on_an_instance(mine, name), 0, called_with)
            except (AttributeError, ImportError, TypeError) as error:
                yield f"{theirs}.{name}: {error}"


def _changed_calls() -> Iterator[str]:
    for path, (num_positional, names) in CALLS.items():
        try:
            _bind(inspect.signature(_find(path)), num_positional, names)
        except (AttributeError, ImportError, TypeError) as error:
            yield f"{path}: {error}"


def _changed_parameters() -> Iterator[str]:
    for path, wanted in PARAMETERS.items():
        try:
            found = tuple(inspect.signature(_find(path)).parameters)
        except (AttributeError, ImportError, TypeError) as error:
            yield f"{path}: {error}"
            continue
        if found != wanted:
            yield f"{path} takes {', '.join(found)} and no longer {', '.join(wanted)}"


def _lost_members() -> Iterator[str]:
    for path, names in MEMBERS.items():
        try:
            owner = _find(path)
        except (AttributeError, ImportError) as error:
            yield f"{path}: {error}"
            continue
        fields = getattr(owner, "__dataclass_fields__", {})
        if lost := [n for n in names if n not in fields and not hasattr(owner, n)]:
            yield f"{path} has lost {', '.join(lost)}"


def _find(path: str) -> Any:
    """`package.module:Class.attribute`; raises `ImportError` or `AttributeError`."""
    module, _, names = path.partition(":")
    found = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _on_an_instance(owner: type, name: str) -> inspect.Signature:
    """The signature of a method as called on an object, be it a class method or not."""
    signature = inspect.signature(getattr(owner, name))
    if inspect.isfunction(inspect.getattr_static(owner, name)):
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def _fixed(signature: inspect.Signature) -> tuple[str, ...]:
    """The parameters that have a name."""
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(name for name, p in signature.parameters.items() if p.kind not in loose)


def _bind(signature: inspect.Signature, num_positional: int, names: tuple[str, ...]) -> None:
    """Raise `TypeError` where a function does not take such a call."""
    signature.bind(*[None] * num_positional, **dict.fromkeys(names))


def _number(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _text(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"


def _install() -> str:
    return f"'vllm>={_text(OLDEST)},<{NEWEST[0]}.{NEWEST[1] + 1}'"
