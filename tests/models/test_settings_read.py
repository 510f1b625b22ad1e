"""Each setting that transformers' model of a family reads and vLLM's does not, or the other way
round, has been thought about: it is stated in `FAMILIES`, or known here to change no answer.
"""

import inspect
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.model_executor.models.registry import _VLLM_MODELS

from camera_serve.models.families import FAMILIES
from tests import tiny_models

_READ = re.compile(
    r"(?<![a-z_])(?:hf_|text_|hf_text_)?config\.([a-z_0-9]+)\b(?!\()"
    r"|getattr\(\s*(?:self\.)?(?:hf_|text_|hf_text_)?config,\s*\"([a-z_0-9]+)\""
)
_VLLM = find_spec("vllm")
assert _VLLM and _VLLM.submodule_search_locations
VLLM_MODELS = Path(_VLLM.submodule_search_locations[0]) / "model_executor" / "models"

BUILT_FROM = {
    "glm4_moe_lite": ("deepseek_v2",),
    "kimi_k25": ("deepseek_v2",),
    "deepseek_v32": ("deepseek_v2",),
    "qwen3_5_moe": ("qwen3_next",),
    "qwen3_5_moe_text": ("qwen3_next",),
    "qwen3_vl_moe": ("qwen3_moe",),
}
"""Other files of vLLM's that have parts of a family's model."""

IN_TRAINING = {
    "attention_dropout",
    "initializer_range",
    "input_jitter_noise",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "use_cache",
}
SAID_OTHERWISE = {
    "hidden_act",  # `silu` in every family: `describe` asks for it.
    "model_type",
    # These agree where `mlp_layer_types` is stated.
    "mlp_layer_types",
    "first_k_dense_replace",
    "layer_types",  # Stated by `use_sliding_window` or `hybrid_layer_pattern`.
    "rope_parameters",
    "partial_rotary_factor",
    "rotary_dim",  # transformers makes `partial_rotary_factor` of it.
    "sliding_window_size",
    # Names of the same number, by transformers' `attribute_map`.
    "n_routed_experts",
    "moe_k",
    "moe_num_experts",
    "moe_intermediate_size",
    "num_mtp_modules",  # Draft layers, which answer nothing.
    "num_nextn_predict_layers",
}
ROUNDING = {"moe_router_dtype", "enable_moe_fp32_combine"}
WITH_ANOTHER = {
    # Read with `index_topk`, which is stated, or which DeepSeek-V3.2 always has.
    "attn_module_list_cfg",
    "index_head_dim",
    "index_n_heads",
    "index_skip_topk_offset",
    "index_topk_freq",
    "index_topk_pattern",
    "indexer_rope_interleave",
}
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ALONE = {
    ("mixtral", "router_jitter_noise"),  # In training.
    ("minimax_m2", "router_jitter_noise"),
    ("minimax_m2", "max_model_len"),  # How long the rotary table is.
    ("phimoe", "lm_head_bias"),  # The plugin looks at the bias itself.
    ("deepseek", "moe_layer_freq"),  # Read by `deepseek.py` under another name.
    ("mimo_v2_flash", "rms_norm_eps"),  # Spelled out as `layernorm_epsilon`.
    *((family, "head_dim") for family in FAMILIES if family.startswith(("deepseek_v", "kimi"))),
    # A wrong one builds latent attention, of other shapes, which loading refuses.
    *(("deepseek", name) for name in _LATENT),
    # Modules of vLLM's own called `config`.
    ("kimi_k25", "json"),
    ("kimi_k25", "multimodal"),
}
BY_THE_LIBRARIES = ({"tie_word_embeddings"}, {"sliding_window"})
"""What transformers, and what vLLM, reads for every model, outside its file."""


def read_in(files: Iterable[Path]) -> set[str]:
    return {a or b for file in files for a, b in _READ.findall(file.read_text())}


def vllm_files(family: str) -> list[Path]:
    named = next(name for name in FAMILIES[family].architectures if name in _VLLM_MODELS)
    names = (_VLLM_MODELS[named][0], *BUILT_FROM.get(family, ()))
    modules = [n if "." in n else f"vllm.model_executor.models.{n}" for n in names]
    paths = [VLLM_MODELS.parents[1] / m.removeprefix("vllm.").replace(".", "/") for m in modules]
    return [f for p in paths for f in (p.rglob("*.py") if p.is_dir() else [p.with_suffix(".py")])]


def transformers_files(family: str) -> set[Path]:
    """Files of the modules that a family's tiny model is made of."""
    theirs = ("transformers.models.", "camera_serve.")
    kinds = {type(module) for module in tiny_models.build(family).modules()}
    return {Path(inspect.getfile(kind)) for kind in kinds if kind.__module__.startswith(theirs)}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_setting_that_one_library_alone_reads_has_been_decided(family: str) -> None:
    config = tiny_models.build(family).config
    always_transformers, always_vllm = BY_THE_LIBRARIES
    vllms = read_in(vllm_files(family)) | always_vllm
    known = config.get_text_config().to_dict().keys() | vllms
    theirs = (read_in(transformers_files(family)) & known) | always_transformers
    assert len(theirs & vllms) > 8, "the model files were not read"
    stated = {key for key, _ in (*FAMILIES[family].understood, *FAMILIES[family].spelled_out)}
    harmless = IN_TRAINING | SAID_OTHERWISE | ROUNDING | WITH_ANOTHER
    harmless |= {key for name, key in ALONE if name == family}
    undecided = (theirs ^ vllms) - stated - harmless
    assert not undecided, f"state them in FAMILIES, or here why they change no answer: {undecided}"
