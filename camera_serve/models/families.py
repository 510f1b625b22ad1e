"""The names and settings of each MoE family, as they stand in its published checkpoints.

A family is data. Routing is never reimplemented here: transformers runs the router, and the
experts see its choices (see `camera_serve.calibration.streaming`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from camera_serve.errors import UnsupportedModelError

Config = Any
"""A transformers config object: settings are attributes, defaults filled in."""


MOST = 10_000
"""More layers, or experts in one, than any model has: a number beyond it is a damaged config."""


def whole(config: Config, key: str, least: int = 1, most: int | None = None) -> int:
    """A setting that is a whole number in a range; raises `UnsupportedModelError` that names it."""
    value: Any = getattr(config, key, None)
    known = isinstance(value, int) and not isinstance(value, bool)
    if known and least <= value and (most is None or value <= most):
        return int(value)
    wanted = f"{least} or more" if most is None else f"{least} to {most}"
    raise UnsupportedModelError(f"{key} is {value!r:.100} in config.json: wanted {wanted}")


def _qwen_has_experts(config: Config, layer: int) -> bool:
    step = whole(config, "decoder_sparse_step")
    return layer not in (config.mlp_only_layers or []) and (layer + 1) % step == 0


def _every_layer_has_experts(config: Config, layer: int) -> bool:
    return True


def _deepseek_has_experts(config: Config, layer: int) -> bool:
    step = whole(config, "moe_layer_freq") if hasattr(config, "moe_layer_freq") else 1
    return layer >= whole(config, "first_k_dense_replace", least=0) and layer % step == 0


def _qwen_shared_d_ff(config: Config) -> int:
    return whole(config, "shared_expert_intermediate_size", least=0)


def _deepseek_shared_d_ff(config: Config) -> int:
    shared = whole(config, "n_shared_experts", least=0) if config.n_shared_experts else 0
    return shared * whole(config, "moe_intermediate_size")


def _no_shared_d_ff(config: Config) -> int:
    return 0


@dataclass(frozen=True)
class Family:
    """Where one family keeps the parts of its MoE layers.

    `moe_name`, `projections`, `shared_name` are names in the checkpoint; `hf_renames` turns a
    checkpoint name into the transformers module name, as (old, new) infixes. `understood` lists
    config settings that change the layer's math, with the values we reproduce exactly.
    `spelled_out` are settings transformers takes for granted and serving engines do not.
    """

    model_type: str
    architectures: tuple[str, ...]
    num_experts_key: str
    d_ff_key: str = "moe_intermediate_size"
    moe_name: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_name: str | None = None
    shared_gate_name: str | None = None
    shared_d_ff: Callable[[Config], int] = _no_shared_d_ff
    has_experts: Callable[[Config, int], bool] = _every_layer_has_experts
    hf_renames: tuple[tuple[str, str], ...] = ()
    understood: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    spelled_out: tuple[tuple[str, Any], ...] = ()


_MIXTRAL_NAMES: dict[str, Any] = {
    "num_experts_key": "num_local_experts",
    "d_ff_key": "intermediate_size",
    "moe_name": "block_sparse_moe",
    "projections": ("w1", "w3", "w2"),
}
_DEEPSEEK_NAMES: dict[str, Any] = {
    "num_experts_key": "n_routed_experts",
    "shared_name": "shared_experts",
    "shared_d_ff": _deepseek_shared_d_ff,
    "has_experts": _deepseek_has_experts,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen2_moe",
            ("Qwen2MoeForCausalLM",),
            num_experts_key="num_experts",
            shared_name="shared_expert",
            shared_gate_name="shared_expert_gate",
            shared_d_ff=_qwen_shared_d_ff,
            has_experts=_qwen_has_experts,
        ),
        Family(
            "qwen3_moe",
            ("Qwen3MoeForCausalLM",),
            num_experts_key="num_experts",
            has_experts=_qwen_has_experts,
        ),
        Family(
            "olmoe",
            ("OlmoeForCausalLM",),
            num_experts_key="num_experts",
            d_ff_key="intermediate_size",
        ),
        Family(
            "mixtral",
            ("MixtralForCausalLM",),
            hf_renames=((".block_sparse_moe.", ".mlp."),),
            **_MIXTRAL_NAMES,
        ),
        Family(
            "phimoe",
            ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
            hf_renames=((".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")),
            **_MIXTRAL_NAMES,
        ),
        Family(
            "deepseek",
            ("DeepseekForCausalLM",),
            understood=(("scoring_func", ("softmax",)),),
            **_DEEPSEEK_NAMES,
        ),
        Family(
            "deepseek_v2",
            ("DeepseekV2ForCausalLM",),
            understood=(
                ("scoring_func", ("softmax",)),
                ("topk_method", ("greedy", "group_limited_greedy")),
                ("norm_topk_prob", (False, None)),
                ("mlp_bias", (False,)),
                ("moe_layer_freq", (1,)),
            ),
            **_DEEPSEEK_NAMES,
        ),
        Family(
            "deepseek_v3",
            ("DeepseekV3ForCausalLM",),
            understood=(
                ("scoring_func", ("sigmoid",)),
                ("topk_method", ("noaux_tc",)),
                ("moe_layer_freq", (1,)),
            ),
            spelled_out=(("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")),
            **_DEEPSEEK_NAMES,
        ),
    )
}
