"""Tiny random models of every family, saved exactly like the checkpoints on the model hub."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from camera_serve.models.families import is_new_enough
from camera_serve.models.registration import register_models

Tensors = dict[str, torch.Tensor]

VOCAB_SIZE = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
}
# vLLM's CPU attention accepts multi-head latent attention only at the published 512 + 64.
_MLA: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 4,
    "topk_group": 2,
}


def _yarn(mscale: float) -> dict[str, Any]:
    # Published V2 and V3 use YaRN. Do not test with plain rotary embeddings: stock vLLM's CPU
    # operator for those is wrong under multi-head latent attention (logits off by 10 and more).
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


# As published: DeepSeek-V3 with one group of experts, and without a draft layer.
_KIMI: dict[str, Any] = {
    **_DEEPSEEK,
    **_MLA,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": _yarn(1.0),
    "q_lora_rank": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.5,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}

_QWEN3_NEXT: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # vLLM's CPU kernel takes no others.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "head_dim": 32,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


def _mrope(*section: int) -> dict[str, Any]:
    """Rotary embeddings of positions in time, height and width; for text all three are the same."""
    interleaved = {"mrope_section": list(section), "mrope_interleaved": True}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **interleaved}}


_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "intermediate_size": 128,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 128,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 64, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 64, "num_experts_per_tok": 2},
    "phimoe": {
        "num_local_experts": 8,
        "intermediate_size": 64,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "deepseek": {**_DEEPSEEK, "norm_topk_prob": False},
    "deepseek_v2": {
        **_DEEPSEEK,
        **_MLA,
        "rope_parameters": _yarn(0.707),
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        **_MLA,
        "n_shared_experts": 1,
        "rope_parameters": _yarn(1.0),
        "q_lora_rank": 32,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v32": {
        **_DEEPSEEK,
        **_MLA,
        "n_shared_experts": 1,
        "rope_parameters": _yarn(1.0),
        "q_lora_rank": 32,
        "routed_scaling_factor": 1.5,
        "index_head_dim": 64,
        "index_n_heads": 2,
        "index_topk": 24,
        "num_nextn_predict_layers": 1,
    },
    "kimi_k2": _KIMI,
    "kimi_k25": {
        "text_config": {**_COMMON, **_KIMI, "model_type": "kimi_k2"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 32,
        "image_token_id": VOCAB_SIZE - 1,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        **_DEEPSEEK,
        "n_shared_experts": 1,
        "head_dim": 32,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe_lite": {
        **_DEEPSEEK,
        **_MLA,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": _yarn(1.0),
        "q_lora_rank": 32,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
    },
    "minimax_m2": {
        "num_local_experts": 8,
        "intermediate_size": 64,
        "head_dim": 32,
        "rotary_dim": 16,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "hy_v3": {
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "expert_hidden_dim": 64,
        "first_k_dense_replace": 1,
        "route_norm": True,
        "qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "moe_num_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "moe_k": 3,
    },
    "mimo_v2_flash": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "sliding_window": 16,
        "layernorm_epsilon": 1e-5,
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "rope_theta": 5000000.0,
        "swa_rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        "swa_num_attention_heads": 2,
        "num_key_value_heads": 1,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "sliding_window_size": 16,
        "add_swa_attention_sink_bias": True,
    },
    "laguna": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "intermediate_size": 96,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "moe_routed_scaling_factor": 1.5,
    },
    "lfm2_moe": {
        "num_hidden_layers": 3,
        # vLLM's CPU operator for rotary embeddings turns the first head alone, as LFM2 calls it.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_dense_layers": 1,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "layer_types": ["conv", "full_attention", "conv"],
        "routed_scaling_factor": 1.5,
        "tie_word_embeddings": True,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "intermediate_size": 64,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
    },
    "afmoe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "num_shared_experts": 1,
        "global_attn_every_n_layers": 2,
        "sliding_window": 16,
        "route_scale": 1.5,
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
        "mup_enabled": True,
    },
    "qwen3_next": {**_QWEN3_NEXT, "norm_topk_prob": True},
    "qwen3_5_moe": {"text_config": {**_QWEN3_NEXT, **_mrope(2, 1, 1)}, "vision_config": _VISION},
    "qwen3_5_moe_text": {**_QWEN3_NEXT, **_mrope(2, 1, 1)},
    "qwen3_vl_moe": {
        "text_config": {
            "num_hidden_layers": 3,
            "head_dim": 32,
            "num_experts": 8,
            # transformers takes a square matrix for one that is not transposed.
            "moe_intermediate_size": 48,
            "intermediate_size": 128,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            **_mrope(6, 5, 5),
        },
        "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
    },
}
# Standard deviations of the logits these matrices make from a unit-variance input.
_GAINS = {"gate": 3.0, "router": 3.0, "lm_head": 4.0}
_ROUTER_BIASES = ("e_score_correction_bias", "expert_bias")
# transformers 5 would write PhimoeForCausalLM, a name the hub and vLLM do not know.
_ARCHITECTURES = {
    "phimoe": "PhiMoEForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
}
# What the published folder says of pictures, of a few patches each.
_PREPROCESSOR = {
    "kimi_k25": {
        "media_proc_cfg": {
            "patch_size": 14,
            "merge_kernel_size": 2,
            "temporal_merge_kernel_size": 4,
            "in_patch_limit": 16,
            "in_patch_limit_each_frame": 16,
            "in_patch_limit_video": 64,
            "patch_limit_on_one_side": 4,
            "fixed_output_tokens": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    }
}
# Settings that transformers writes and published config.json's of the family do not have.
_UNPUBLISHED = {
    "deepseek_v32": ("layer_types", "mlp_layer_types"),
    "glm4_moe_lite": ("mlp_layer_types",),
    "minimax_m2": ("partial_rotary_factor", "rope_parameters"),
}
# As published; transformers 5 would write what it cannot read itself.
_RENAMED = {
    "kimi_k25": (
        ("language_model.model.blocks.", "language_model.model.layers."),
        ("model.mm_projector.", "mm_projector."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ),
}

FAMILIES = tuple(family for family in _SETTINGS if is_new_enough(family))
"""Every model type that is supported with the installed transformers."""

FORMS = tuple(
    family
    for family in (
        "qwen2_moe",  # A shared expert behind a gate.
        "mixtral",  # w1, w2 and w3, in a block of another name.
        "deepseek_v3",  # Grouped routing, a dense layer before, a shared expert without a gate.
        "qwen3_5_moe",  # Nested, fused, with linear attention, a draft and parts that see.
        "qwen3_vl_moe",  # Fused and transposed.
        "kimi_k25",  # Names that begin in another way.
        "granitemoe",  # Fused under names of its own; multipliers.
        "lfm2_moe",  # Convolutions, and another last norm.
        "laguna",  # Routed experts that are scaled after their sum.
    )
    if family in FAMILIES
)
"""A family for each form that models and checkpoints have, for tests that others add nothing to."""

SAVED_AS_PUBLISHED = tuple(family for family in FAMILIES if family not in _RENAMED)
"""Those of which transformers gives every tensor the name it has in the published checkpoints."""


def settings(family: str) -> dict[str, Any]:
    """What is set of a family's config."""
    own = _SETTINGS[family]
    if "text_config" not in own:
        return _COMMON | own
    return own | {"text_config": _COMMON | own["text_config"]}


def build(family: str, *, seed: int = 0, **config_overrides: Any) -> nn.Module:
    """A random float32 model of `family` whose logits are not flat and whose router is decisive."""
    register_models()
    own = settings(family)
    if "text_config" in own:
        own = own | {"text_config": own["text_config"] | config_overrides}
    else:
        own = own | config_overrides
    config = AutoConfig.for_model(family, **own)
    model = _auto_class(config).from_config(config, dtype=torch.float32)
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def load(path: Path, **arguments: Any) -> nn.Module:
    """The whole model of a checkpoint, by transformers' Auto class that makes it."""
    register_models()
    return _auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, **arguments).eval()


def _auto_class(config: Any) -> Any:
    # A model that sees pictures as well; AutoModelForCausalLM makes its text part, or nothing.
    seeing = config.get_text_config() is not config
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def save(
    family: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "5GB",
    original_format: bool = True,
    **config_overrides: Any,
) -> Path:
    """Save `build(family, ...)` with its tokenizer in `path` and return `path`.

    Without `original_format`: experts fused and tensors named as transformers has them in memory,
    or one by one where that is how the family is published.
    """
    model = build(family, seed=seed, **config_overrides).to(dtype)
    logging.disable_progress_bar()
    one_by_one = original_format == (family not in _PUBLISHED_FUSED)
    whole = family in _PUBLISHED or family in _DRAFTS
    model.save_pretrained(
        path,
        state_dict={**model.state_dict(), **_draft_layer(model, seed)},
        max_shard_size="5GB" if whole else max_shard_size,
        save_original_format=one_by_one,
    )
    if whole:
        tensors = load_file(path / "model.safetensors")
        if original_format and family in _PUBLISHED:
            tensors = _PUBLISHED[family](tensors)
        if family in _DRAFTS:
            tensors |= _draft(model, fused=family in _PUBLISHED_FUSED)
        (path / "model.safetensors").unlink()
        save_torch_state_dict(tensors, path, max_shard_size=max_shard_size)
    if original_format:
        _rename(path, _RENAMED.get(family, ()))
    _write_config(model, family, path / "config.json")
    tokenizer().save_pretrained(path)
    if family in _PREPROCESSOR:
        (path / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR[family]))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries: it encodes any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Unit-variance signals everywhere, and micro-experts of very different importance."""
    for name, tensor in _weights_and_buffers(model):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(_ROUTER_BIASES):
            tensor.copy_(0.2 * noise)
        elif "norm" in name and name.endswith("weight"):
            # Some families' norms multiply with 1 + weight: they start at 0.
            tensor.copy_(tensor.flatten()[0] + 0.2 * noise)
        elif name == "lm_head.bias":
            # Phi has one, and stock vLLM loads it but never adds it to the logits.
            tensor.zero_()
        elif name.endswith("bias"):
            tensor.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            gain = _GAINS.get(name.split(".")[-2], 1.4)
            tensor.copy_(gain / math.sqrt(tensor.shape[-1]) * noise)
        if name.endswith(("down_proj", "down_proj.weight")):
            spread = torch.randn((*tensor.shape[:-2], 1, tensor.shape[-1]), generator=generator)
            tensor.mul_(torch.exp(0.7 * spread))


def _weights_and_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith(_ROUTER_BIASES):
            yield name, buffer


def _draft_layer(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The layer past the last one that predicts tokens ahead: published, and not in the model."""
    text = model.config.get_text_config()
    if not getattr(text, "num_nextn_predict_layers", 0):
        return {}
    last, draft = (f"model.layers.{text.num_hidden_layers - n}." for n in (1, 0))
    layer = {draft + n.removeprefix(last): t for n, t in model.state_dict().items() if last in n}
    norm = torch.ones_like(model.state_dict()["model.norm.weight"])
    layer |= {f"{draft}{name}.weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    layer[f"{draft}eh_proj.weight"] = norm.repeat(len(norm), 2)
    generator = torch.Generator().manual_seed(seed + 1)
    return {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in layer.items()}


def _rename(path: Path, renames: tuple[tuple[str, str], ...]) -> None:
    for file in path.glob("*.safetensors") if renames else ():
        tensors = load_file(file)
        for old, new in renames:
            tensors = {
                new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()
            }
        save_file(tensors, file, metadata={"format": "pt"})


def _transposed(tensors: Tensors) -> Tensors:
    return {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}


def _in_a_larger_model(tensors: Tensors) -> Tensors:
    """As transformers saves the text part that it took out of a model that sees pictures."""
    return {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}


def _draft(model: nn.Module, *, fused: bool) -> Tensors:
    """The head that drafts the next tokens: a copy of the last layer, norms, and a matrix.

    Its experts are stored one by one in Qwen3-Next and Qwen3.5, and fused in Qwen3.6.
    """
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matches = {name: re.fullmatch(r"model\..*layers\.1\.(.+)", name) for name in weights}
    draft = {f"mtp.layers.0.{m[1]}": weights[name] for name, m in matches.items() if m}
    if not fused:
        experts = "mtp.layers.0.mlp.experts"
        halves = draft.pop(f"{experts}.gate_up_proj").chunk(2, dim=1)
        parts = dict(zip(("gate", "up"), halves, strict=True))
        for name, stacked in (parts | {"down": draft.pop(f"{experts}.down_proj")}).items():
            draft |= {f"{experts}.{e}.{name}_proj.weight": w.clone() for e, w in enumerate(stacked)}
    norm = weights["lm_head.weight"][0]
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        draft[f"mtp.{name}.weight"] = norm.clone()
    return draft | {"mtp.fc.weight": torch.cat([torch.diag(norm)] * 2, dim=1)}


_PUBLISHED_FUSED = ("qwen3_5_moe", "qwen3_vl_moe")
_PUBLISHED: dict[str, Callable[[Tensors], Tensors]] = {
    "qwen3_5_moe_text": _in_a_larger_model,
    "qwen3_vl_moe": _transposed,
}
_DRAFTS = ("qwen3_next", "qwen3_5_moe")


def _write_config(model: nn.Module, family: str, path: Path) -> None:
    config = json.loads(path.read_text())
    config["architectures"] = [_ARCHITECTURES.get(family, type(model).__name__)]
    config["model_type"] = family
    config = {k: v for k, v in config.items() if k not in _UNPUBLISHED.get(family, ())}
    if text_type := _SETTINGS[family].get("text_config", {}).get("model_type"):
        # transformers would write the type it reads this one as.
        config["text_config"]["model_type"] = text_type
    path.write_text(json.dumps(config, indent=2) + "\n")
