"""What each MoE family has of its own: names in its published checkpoints, and settings.

A family is data, and states only what differs from the usual. Where its experts lie, how many and
how wide they are is found in transformers' own model of it (`camera_serve.models.modules`); routing
is never reimplemented: transformers runs the router, and the experts see its choices (see
`camera_serve.calibration.streaming`).
"""

from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version

from camera_serve.errors import TRANSFORMERS_TESTED, LibraryError, UnsupportedModelError

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
    name, as (old, new) infixes, and `hf_prefixes` as what names begin with; `also_stored` turns
    names that other programs store into those of the checkpoint, as `hf_renames`. `top_k_key` is
    the setting of how many experts a token takes. `understood` lists config settings that change
    the layer's math, with the values we reproduce exactly. `spelled_out` are settings that serving
    engines ask for and transformers takes for granted, or makes of others: with their value, or the
    function of a config that gives it. `known_as` is the model type transformers has the family
    under, where that is another one, and `transformers` the oldest version that computes it as
    published. `elsewhere` are what names of parts beside the text model begin with: such tensors
    are carried over as they are. `fused_transposed`: transformers loads a dense model's experts in
    no other form.
    """

    architectures: tuple[str, ...]
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    hf_renames: tuple[tuple[str, str], ...] = ()
    hf_prefixes: tuple[tuple[str, str], ...] = ()
    top_k_key: str = "num_experts_per_tok"
    understood: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    spelled_out: tuple[tuple[str, Any], ...] = ()
    known_as: str = ""
    transformers: str = TRANSFORMERS_TESTED[0]
    elsewhere: tuple[str, ...] = ()
    also_stored: tuple[tuple[str, str], ...] = ()
    fused_transposed: bool = False

    def settings_spelled_out(self, text: Config) -> dict[str, Any]:
        """`spelled_out` for the config of a text model, by name."""
        return {key: value(text) if callable(value) else value for key, value in self.spelled_out}


def _count_dense(text: Config) -> int:
    return int(text.mlp_layer_types.count("dense"))


def _dense_first(text: Config, dense: int) -> list[str]:
    """`mlp_layer_types` of a model whose first layers have no experts, and all others do."""
    return ["dense"] * dense + ["sparse"] * (text.num_hidden_layers - dense)


# vLLM reads a number of dense layers, transformers what each layer is.
_DENSE_FIRST = (
    ("first_k_dense_replace", _count_dense),
    ("mlp_layer_types", lambda text: _dense_first(text, _count_dense(text))),
)
_W123 = ("w1", "w3", "w2")
_SIGMOID = (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"))
# Biases that transformers adds and vLLM's models leave out.
_NO_ATTENTION_BIAS = ("attention_bias", (False,))
_NO_MLP_BIAS = ("mlp_bias", (False,))
# vLLM's models have a head of their own there, which no checkpoint with tied weights fills.
_UNTIED = ("tie_word_embeddings", (False,))
# Read by vLLM whatever the model, and not by transformers' model of the family.
_NO_WINDOW = ("sliding_window", (0, None))
_NO_CHUNKS = ("dual_chunk_attention_config", (None,))
_CAUSAL = ("is_causal", (True, None))
_NO_SHARED_EXPERT = ("shared_expert_intermediate_size", (0, None))
# vLLM serves all of DeepSeek with one model, and takes what a config names for what it has.
_DEEPSEEK = (
    _NO_ATTENTION_BIAS,
    _NO_WINDOW,
    _CAUSAL,
    _UNTIED,
    ("llama_4_scaling", (None,)),
)
_NO_INDEXER = ("index_topk", (None,))
_DEEPSEEK_V3 = (
    *_DEEPSEEK,
    ("moe_layer_freq", (1,)),
    ("rope_interleave", (True, None)),
)
# transformers has an attention that is always gated and may have biases; vLLM reads these settings,
# and knows none of the biases.
_QWEN3_NEXT = (
    ("attn_output_gate", (True,)),
    _NO_ATTENTION_BIAS,
    ("qkv_bias", (False,)),
    ("layer_scale", (False, None)),
    ("output_gate_type", ("silu", "swish")),
    _NO_WINDOW,
    _NO_CHUNKS,
    _CAUSAL,
)
_QWEN3_5: tuple[tuple[str, tuple[Any, ...]], ...] = (
    *_QWEN3_NEXT,
    ("mlp_only_layers", ([], None)),
    ("decoder_sparse_step", (1, None)),
)
# transformers always renormalises routing weights here, vLLM as the setting says.
_RENORMALISED = ("norm_topk_prob", (True,))

IN_VLLM = {
    "attention_bias": "vLLM's model has the biases of attention in one way alone",
    "mlp_bias": "vLLM's model leaves the biases out",
    "qkv_bias": "vLLM's model has these biases in one way alone",
    "clip_qkv": "vLLM does not clip",
    "rms_norm_eps": "vLLM's norms have an epsilon of their own",
    "norm_topk_prob": "vLLM's model and transformers' do not weigh experts alike",
    "router_jitter_noise": "vLLM's router has a value of its own",
    "tie_word_embeddings": "vLLM's model would have another head (save the model with the other "
    "setting, and a head of its own)",
    "sliding_window": "vLLM would limit attention to it, and transformers does not",
    "use_sliding_window": "vLLM does not limit attention in some layers alone",
    "dual_chunk_attention_config": "vLLM would attend in chunks, and transformers does not",
    "is_causal": "vLLM would attend to later tokens, and transformers does not",
    "llama_4_scaling": "vLLM would scale queries, and transformers does not",
    "index_topk": "vLLM would take it for another model, of sparse attention",
    "shared_expert_intermediate_size": "vLLM would add a shared expert without weights",
}
"""By setting, what vLLM does with values that are not understood: transformers does otherwise."""

FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        ("Qwen2MoeForCausalLM",),
        understood=(("qkv_bias", (True,)), ("use_sliding_window", (False,)), _NO_CHUNKS),
    ),
    "qwen3_moe": Family(
        ("Qwen3MoeForCausalLM",), understood=(_NO_ATTENTION_BIAS, _NO_SHARED_EXPERT, _NO_CHUNKS)
    ),
    # vLLM reads none of these.
    "olmoe": Family(
        ("OlmoeForCausalLM",),
        understood=(
            _NO_ATTENTION_BIAS,
            ("clip_qkv", (None,)),
            ("norm_topk_prob", (False,)),
            ("rms_norm_eps", (1e-5,)),
            _UNTIED,
            _NO_WINDOW,
        ),
    ),
    "mixtral": Family(
        ("MixtralForCausalLM",), _W123, hf_renames=((".block_sparse_moe.", ".mlp."),)
    ),
    "phimoe": Family(
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        _W123,
        hf_renames=((".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router.")),
        understood=(("attention_bias", (True,)), ("router_jitter_noise", (0.01,)), _UNTIED),
    ),
    "deepseek": Family(
        ("DeepseekForCausalLM",),
        understood=(
            *_DEEPSEEK,
            _NO_MLP_BIAS,
            _NO_INDEXER,
            ("scoring_func", ("softmax",)),
            ("topk_method", ("greedy", None)),
            ("routed_scaling_factor", (1.0, None)),
            ("n_group", (1, None)),
            ("topk_group", (1, None)),
        ),
        spelled_out=(("head_dim", lambda text: text.hidden_size // text.num_attention_heads),),
    ),
    "deepseek_v2": Family(
        ("DeepseekV2ForCausalLM",),
        understood=(
            ("scoring_func", ("softmax",)),
            ("topk_method", ("greedy", "group_limited_greedy")),
            ("norm_topk_prob", (False, None)),
            *_DEEPSEEK,
            _NO_MLP_BIAS,
            _NO_INDEXER,
            ("moe_layer_freq", (1,)),
        ),
    ),
    "deepseek_v3": Family(
        ("DeepseekV3ForCausalLM",),
        understood=(*_DEEPSEEK_V3, _NO_INDEXER),
        spelled_out=_SIGMOID,
    ),
    "deepseek_v32": Family(
        ("DeepseekV32ForCausalLM",),
        understood=_DEEPSEEK_V3,
        spelled_out=(
            *_SIGMOID,
            ("mlp_layer_types", lambda text: _dense_first(text, text.first_k_dense_replace)),
        ),
    ),
    "kimi_k2": Family(
        ("DeepseekV3ForCausalLM",),
        understood=(*_DEEPSEEK_V3, _NO_INDEXER),
        spelled_out=_SIGMOID,
        known_as="deepseek_v3",
    ),
    "kimi_k25": Family(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        hf_prefixes=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        understood=(*_DEEPSEEK_V3, _NO_INDEXER),
        spelled_out=_SIGMOID,
        elsewhere=("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector."),
        # As transformers saves what it read from a published checkpoint.
        also_stored=(
            ("language_model.model.blocks.", "language_model.model.layers."),
            ("model.mm_projector.pre_norm.", "mm_projector.pre_norm."),
            ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
        ),
    ),
    "glm4_moe": Family(
        ("Glm4MoeForCausalLM",),
        understood=(
            ("scoring_func", ("sigmoid",)),
            ("topk_method", ("noaux_tc",)),
            _UNTIED,
            _NO_WINDOW,
        ),
    ),
    # vLLM knows dense layers by `first_k_dense_replace` alone, transformers by `mlp_layer_types`.
    "glm4_moe_lite": Family(
        ("Glm4MoeLiteForCausalLM",),
        understood=(
            *_DEEPSEEK_V3,
            _NO_INDEXER,
            ("scoring_func", ("sigmoid",)),
            ("topk_method", ("noaux_tc",)),
        ),
        spelled_out=(
            ("first_k_dense_replace", 1),
            ("mlp_layer_types", lambda text: _dense_first(text, 1)),
        ),
    ),
    # Up to 5.17 transformers does not read `rotary_dim` and rotates all of a head.
    "minimax_m2": Family(
        ("MiniMaxM2ForCausalLM",),
        _W123,
        hf_renames=((".block_sparse_moe.", ".mlp."),),
        understood=(
            _NO_ATTENTION_BIAS,
            ("shared_intermediate_size", (0,)),
            _UNTIED,
            _NO_WINDOW,
        ),
        spelled_out=(("scoring_func", "sigmoid"), ("use_routing_bias", True)),
        transformers="5.18",
    ),
    "hy_v3": Family(
        ("HYV3ForCausalLM",),
        hf_renames=(
            (".mlp.router.gate.", ".mlp.gate."),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
        ),
        understood=(_NO_MLP_BIAS, _NO_ATTENTION_BIAS, _NO_WINDOW),
        spelled_out=(
            *_DENSE_FIRST,
            ("expert_hidden_dim", lambda text: text.moe_intermediate_size),
            ("qk_norm", True),
            ("route_norm", True),
        ),
    ),
    "ernie4_5_moe": Family(
        ("Ernie4_5_MoeForCausalLM",),
        hf_renames=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
        top_k_key="moe_k",
        understood=(
            ("use_moe", (True,)),
            ("moe_norm_min", (1e-12,)),
            ("use_bias", (False,)),
            _NO_WINDOW,
        ),
    ),
    # vLLM reads names of the published config.json that transformers does not know; its
    # `sliding_window_size` is that window in some versions of transformers, and one less in others.
    "mimo_v2_flash": Family(
        ("MiMoV2FlashForCausalLM",),
        hf_renames=((".self_attn.attention_sink_bias", ".self_attn.sinks"),),
        understood=(
            ("scoring_func", ("sigmoid",)),
            ("routed_scaling_factor", (1.0, None)),
            _UNTIED,
        ),
        spelled_out=(
            ("layernorm_epsilon", lambda text: text.rms_norm_eps),
            ("moe_layer_freq", lambda text: [int(t == "sparse") for t in text.mlp_layer_types]),
            (
                "hybrid_layer_pattern",
                lambda text: [int(t == "sliding_attention") for t in text.layer_types],
            ),
            ("swa_num_attention_heads", lambda text: text.num_attention_heads),
            ("swa_num_key_value_heads", lambda text: 2 * text.num_key_value_heads),
            ("swa_head_dim", lambda text: text.head_dim),
            ("swa_v_head_dim", lambda text: text.v_head_dim),
            ("rope_theta", lambda text: text.rope_parameters["full_attention"]["rope_theta"]),
            (
                "swa_rope_theta",
                lambda text: text.rope_parameters["sliding_attention"]["rope_theta"],
            ),
            (
                "partial_rotary_factor",
                lambda text: text.rope_parameters["full_attention"]["partial_rotary_factor"],
            ),
            ("add_swa_attention_sink_bias", True),
            ("add_full_attention_sink_bias", False),
        ),
    ),
    "laguna": Family(
        ("LagunaForCausalLM",),
        hf_renames=(
            (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            (".mlp.shared_expert.", ".mlp.shared_experts."),
        ),
        understood=(
            ("moe_apply_router_weight_on_input", (False,)),
            ("gating", (True, "per-head", "per-element")),
            ("swa_attention_sink_enabled", (False, None)),
            ("swa_rope_parameters", (None,)),
            _NO_ATTENTION_BIAS,
        ),
    ),
    # vLLM takes the embedding for the head, whatever the setting says.
    "lfm2_moe": Family(
        ("Lfm2MoeForCausalLM",),
        _W123,
        understood=(("tie_word_embeddings", (True,)), ("conv_bias", (False,)), _NO_WINDOW),
    ),
    "granitemoe": Family(
        ("GraniteMoeForCausalLM",),
        hf_renames=(
            (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
            (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
            (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
        ),
        understood=(_NO_ATTENTION_BIAS, _NO_WINDOW),
    ),
    "afmoe": Family(
        ("AfmoeForCausalLM",),
        understood=(_NO_ATTENTION_BIAS, _UNTIED),
        spelled_out=(
            ("score_func", "sigmoid"),
            ("route_norm", True),
            ("n_group", 1),
            ("topk_group", 1),
        ),
    ),
    "qwen3_next": Family(("Qwen3NextForCausalLM",), understood=(*_QWEN3_NEXT, _UNTIED)),
    "qwen3_5_moe": Family(
        ("Qwen3_5MoeForConditionalGeneration",), understood=(*_QWEN3_5, _RENORMALISED)
    ),
    "qwen3_5_moe_text": Family(
        ("Qwen3_5MoeForCausalLM",),
        understood=(*_QWEN3_5, _RENORMALISED),
        # As transformers saves the text part that it took out of the model above.
        also_stored=(("model.language_model.", "model."),),
    ),
    "qwen3_vl_moe": Family(
        ("Qwen3VLMoeForConditionalGeneration",),
        understood=(
            _NO_ATTENTION_BIAS,
            _NO_SHARED_EXPERT,
            _NO_CHUNKS,
            _NO_WINDOW,
        ),
        spelled_out=(("norm_topk_prob", True),),
        fused_transposed=True,
    ),
}


def is_new_enough(model_type: str) -> bool:
    """Whether the installed transformers computes a family as published."""
    return Version(transformers.__version__) >= Version(FAMILIES[model_type].transformers)


def require_transformers(model_type: str) -> None:
    """Raise `LibraryError` where the installed transformers is too old for a family."""
    if model_type in FAMILIES and not is_new_enough(model_type):
        oldest = FAMILIES[model_type].transformers
        raise LibraryError(
            f"{model_type} needs transformers {oldest} or newer, and this is "
            f"{transformers.__version__}, which computes it in another way or not at all: "
            f"pip install 'transformers>={oldest}'"
        )
