"""Layers that draft tokens, added to tiny models on disk: transformers has none to save."""

from pathlib import Path

import torch

from tests.editing import Tensors, edit_config, edit_weights

LAST, DRAFT = "model.layers.2.", "model.layers.3."
"""What the names of the last layer of tiny_models' DeepSeek begin with, and its draft layer's."""


def add_deepseek_mtp(dense: Path) -> None:
    """Give a one-file DeepSeek-V3 checkpoint the draft layer that published ones have.

    It guesses well: most of what the model does is done by the experts of its last layer, and the
    draft layer does the same to the last token.
    """
    edit_weights(dense, _add_deepseek_mtp)
    edit_config(dense, lambda config: config.update(num_nextn_predict_layers=1))


def _add_deepseek_mtp(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "o_proj" in name or ("down_proj" in name and not name.startswith(LAST)):
            tensor.mul_(0.1)
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    # What the draft layer's own norm leaves as it is.
    embedding.div_(embedding.float().square().mean(1, keepdim=True).sqrt())
    for name in [name for name in tensors if name.startswith(LAST)]:
        tensors[name.replace(LAST, DRAFT)] = tensors[name].clone()
    token = torch.eye(len(norm), 2 * len(norm), dtype=norm.dtype)
    tensors |= {
        f"{DRAFT}embed_tokens.weight": embedding.clone(),
        f"{DRAFT}enorm.weight": torch.ones_like(norm),
        f"{DRAFT}hnorm.weight": torch.ones_like(norm),
        f"{DRAFT}eh_proj.weight": token,
        f"{DRAFT}shared_head.norm.weight": norm.clone(),
        f"{DRAFT}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


def add_qwen_mtp(dense: Path) -> None:
    """Give a one-file Qwen checkpoint `mtp.*`, as published ones have it: here with fused experts.

    And a vision tower, which compress has nothing to do with either.
    """
    edit_weights(dense, _add_qwen_mtp)


def _add_qwen_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.self_attn.")]:
        tensors[name.replace("model.layers.1.", "mtp.layers.0.")] = tensors[name].clone()
    tensors |= {
        "mtp.fc.weight": torch.randn(64, 128),
        "mtp.norm.weight": torch.randn(64).half(),
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(8, 128, 64).bfloat16(),
        "mtp.layers.0.mlp.experts.down_proj": torch.randn(8, 64, 64).bfloat16(),
        "visual.blocks.0.attn.qkv.weight": torch.randn(48, 16).bfloat16(),
    }
