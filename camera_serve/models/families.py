"""What each MoE family has of its own: names in its published checkpoints, and settings.

A family is data, and states only what differs from the usual. Where its experts lie, how many and
how wide they are is found in transformers' own model of it (`camera_serve.models.modules`); routing
is never reimplemented: transformers runs the router, and the experts see its choices (see
`camera_serve.calibration.streaming`).
"""

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


@dataclass(frozen=True)
class Family:
    """What one family calls its parts, where it differs from `gate_proj`, `up_proj`, `down_proj`.

    `architectures`: classes its checkpoints name, the first of them the one we write. `projections`
    are names in the checkpoint; `hf_renames` turns a checkpoint name into the transformers module
    name, as (old, new) infixes. `top_k_key` is the setting of how many experts a token takes.
    `understood` lists config settings that change the layer's math, with the values we reproduce
    exactly. `spelled_out` are settings transformers takes for granted and serving engines do not.
    """

    architectures: tuple[str, ...]
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    hf_renames: tuple[tuple[str, str], ...] = ()
    top_k_key: str = "num_experts_per_tok"
    understood: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    spelled_out: tuple[tuple[str, Any], ...] = ()


_W123 = ("w1", "w3", "w2")

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(("Qwen2MoeForCausalLM",)),
    "qwen3_moe": Family(("Qwen3MoeForCausalLM",)),
    "olmoe": Family(("OlmoeForCausalLM",)),
    "mixtral": Family(
        ("MixtralForCausalLM",), _W123, hf_renames=((".block_sparse_moe.", ".mlp."),)
    ),
    "phimoe": Family(
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        _W123,
        hf_renames=((".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")),
    ),
    "deepseek": Family(("DeepseekForCausalLM",), understood=(("scoring_func", ("softmax",)),)),
    "deepseek_v2": Family(
        ("DeepseekV2ForCausalLM",),
        understood=(
            ("scoring_func", ("softmax",)),
            ("topk_method", ("greedy", "group_limited_greedy")),
            ("norm_topk_prob", (False, None)),
            ("mlp_bias", (False,)),
            ("moe_layer_freq", (1,)),
        ),
    ),
    "deepseek_v3": Family(
        ("DeepseekV3ForCausalLM",),
        understood=(
            ("scoring_func", ("sigmoid",)),
            ("topk_method", ("noaux_tc",)),
            ("moe_layer_freq", (1,)),
        ),
        spelled_out=(("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")),
    ),
}
