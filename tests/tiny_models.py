"""Tiny random models of every family, saved exactly like the checkpoints on the model hub."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from camera_serve.models.deepseek import register_deepseek

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
}
# Standard deviations of the logits these matrices make from a unit-variance input.
_GAINS = {"gate": 3.0, "router": 3.0, "lm_head": 4.0}
# transformers 5 would write PhimoeForCausalLM, a name the hub and vLLM do not know.
_ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}

FAMILIES = tuple(_SETTINGS)
"""Every supported model type."""


def build(family: str, *, seed: int = 0, **config_overrides: Any) -> nn.Module:
    """A random float32 model of `family` whose logits are not flat and whose router is decisive."""
    register_deepseek()
    settings = {**_COMMON, **_SETTINGS[family], **config_overrides}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


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

    Without `original_format`: experts fused and tensors named as transformers has them in memory.
    """
    model = build(family, seed=seed, **config_overrides).to(dtype)
    logging.disable_progress_bar()
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=original_format)
    _write_config(model, family, path / "config.json")
    tokenizer().save_pretrained(path)
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
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
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
        if name.endswith("e_score_correction_bias"):
            yield name, buffer


def _write_config(model: nn.Module, family: str, path: Path) -> None:
    config = json.loads(path.read_text())
    config["architectures"] = [_ARCHITECTURES.get(family, type(model).__name__)]
    path.write_text(json.dumps(config, indent=2) + "\n")
