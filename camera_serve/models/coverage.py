"""Which MoE model types are refused, and why, in words that a user is told.

Each type that transformers knows is either in `FAMILIES` or here: a test asks this of the installed
transformers, the oldest and the newest.
"""

from collections.abc import Iterator

from transformers import PreTrainedConfig

from camera_serve.models.families import Config

_LIMITED = "its experts clamp what they compute, in some layers at least: more than plain SwiGLU"
_NOT_SWIGLU = "its experts compute no SwiGLU: they have another activation, or no gate"
_BIASED = "its experts have biases"
_ON_INPUT = "its router's weights go onto the experts' input"
_NOT_ALIKE = "it has experts of more than one kind: for text and for pictures, or for attention too"
_WEIGHED = "its router weighs the shared experts as well"
_LATENT = "its experts lie between projections and norms of their own"
_UNCHANGED = "some of its experts hand a token on unchanged"
_OWN_FORM = "its experts have a form of their own in transformers"
_BETWEEN = "more passes between its layers than hidden states"
_BESIDE = "its shared experts lie beside its MoE layers, and are not ranked together with them"
_NO_TEXT = "it writes no text token by token, from decoder layers alone"
_A_PART = "it is a part of a larger model: the folder of the whole one is needed"
_NOT_TRIED = "nobody has compared its compressed answers with those of the original yet"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("deepseek_v4", "exaone_moe", "glm5_next", "glm5_next_text"),
            *("hy_v4", "hy_v4_vl", "hy_v4_vl_text", "minimax_m3_vl", "minimax_m3_vl_text"),
            *("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
            *("step3p5", "step3p7"),
        ),
        _LIMITED,
    ),
    **dict.fromkeys(
        (
            *("diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text"),
            *("nemo_speechlm", "nemotron_h", "nemotron_h_omni"),
        ),
        _NOT_SWIGLU,
    ),
    "gpt_oss": _BIASED,
    **dict.fromkeys(("llama4", "llama4_text"), _ON_INPUT),
    **dict.fromkeys(
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "jetmoe", "dots3_note", "dots3_note_text"),
        _NOT_ALIKE,
    ),
    **dict.fromkeys(("inkling_mm_model", "inkling_text"), _WEIGHED),
    **dict.fromkeys(("muse_spark", "muse_spark_text"), _LATENT),
    "longcat_flash": _UNCHANGED,
    **dict.fromkeys(("granitemoe_swa", "granitemoehybrid", "granitemoeshared"), _BESIDE),
    **dict.fromkeys(("dbrx", "doge"), _OWN_FORM),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "zaya"), _BETWEEN),
    **dict.fromkeys(
        (
            *("dots3_note_vision_encoder", "nllb-moe", "openai_privacy_filter"),
            *("switch_transformers", "vitpose", "vitpose_backbone"),
        ),
        _NO_TEXT,
    ),
    **dict.fromkeys(
        ("qwen3_omni_moe_talker_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"), _A_PART
    ),
    **dict.fromkeys(
        (
            *("aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe"),
            *("deepseek_ocr2", "deepseek_ocr2_text", "dots1", "flex_olmo", "flint"),
            *("glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("jamba", "kimi_linear", "kolibri1", "lara_mini", "mellum", "minimax", "mistral4"),
            *("mistral_large4", "mistral_large4_text", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
            *("sarvam_mla", "sarvam_moe", "solar_open", "unlimited_ocr", "unlimited_ocr_text"),
        ),
        _NOT_TRIED,
    ),
}
"""By model type, why it is refused: what follows `is not supported: `."""


def why_not(config: Config) -> str:
    """Why a model of a type that is not in `FAMILIES` is refused."""
    if reason := REFUSED.get(config.model_type):
        return reason
    if with_experts := next((c for c in _parts(config) if _counts_experts(c)), None):
        part = "" if with_experts is config else f" in its part of type {with_experts.model_type!r}"
        return f"it has experts{part}, and this version of camera-serve has not learnt their form"
    return "it is a dense model, and CAMERA compresses experts"


def has_experts(config: Config) -> bool:
    """Whether a setting of a config, or of one of its parts, is about experts."""
    return any(_counts_experts(part) for part in _parts(config))


def _parts(config: Config) -> Iterator[Config]:
    """A config and those nested in it, of its text part for one."""
    yield config
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)


def _counts_experts(part: Config) -> bool:
    # Not the private ones: every config holds which implementation its experts would have.
    return any("expert" in name for name in vars(part) if not name.startswith("_"))
