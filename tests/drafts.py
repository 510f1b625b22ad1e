"""Layers that draft tokens, added to tiny models on disk: transformers has none to save."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.editing import Tensors, edit_config, edit_weights

DRAFT = "model.layers.3."
"""What the names of the draft layer of tiny_models' DeepSeek begin with."""


@dataclass(frozen=True)
class _Form:
    """What published checkpoints call the layer that drafts, its norms, and its matrix.

    enorm, hnorm: norms of the embedded token and of the hidden state, joined by `joined`; norm: the
    last one, empty where there is none. before_mlp: the norm in the layer, if another name.
    mlp_of: the model's layer that its MLP, dense or of experts, is a copy of. own: whether the
    embedding and the head are stored with it once more.
    """

    layer: str
    enorm: str
    hnorm: str
    joined: str
    norm: str
    before_mlp: str = "post_attention_layernorm"
    mlp_of: int = -1
    own: bool = False
    setting: str = "num_nextn_predict_layers"


def _past_the_last(layer: str, norm: str, own: bool) -> _Form:
    parts = (f"{layer}{name}" for name in ("enorm", "hnorm", "eh_proj", norm))
    return _Form(layer, *parts, own=own)


_FORMS = {
    "deepseek_v3": _past_the_last(DRAFT, "shared_head.norm", own=True),
    "hy_v3": _past_the_last("model.layers.2.", "final_layernorm", own=False),
    "qwen3_5_moe": _Form(
        "mtp.layers.0.",
        "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden",
        "mtp.fc",
        "mtp.norm",
        setting="mtp_num_hidden_layers",
    ),
    "ernie4_5_moe": _Form(
        "model.mtp_block.0.",
        "model.mtp_emb_norm.0",
        "model.mtp_hidden_norm.0",
        "model.mtp_linear_proj.0",
        "",
        mlp_of=0,
    ),
    "mimo_v2_flash": _Form(
        "model.mtp.layers.0.",
        "model.mtp.layers.0.enorm",
        "model.mtp.layers.0.hnorm",
        "model.mtp.layers.0.eh_proj",
        "model.mtp.layers.0.final_layernorm",
        before_mlp="pre_mlp_layernorm",
        mlp_of=0,
    ),
}


def layer_of(family: str) -> str:
    """What the names of the draft layer of a family's tiny model begin with."""
    return _FORMS[family].layer


def add_deepseek_mtp(dense: Path) -> None:
    """`add_mtp` for DeepSeek-V3."""
    add_mtp("deepseek_v3", dense)


def add_mtp(family: str, dense: Path) -> None:
    """Give a one-file checkpoint the draft layer that published ones of its family have.

    It guesses well: most of what the model does is done by the MLP of one layer, and the draft
    layer does the same to the last token.
    """
    form = _FORMS[family]
    edit_weights(dense, lambda tensors: _add_mtp(tensors, form))
    edit_config(dense, lambda config: config.get("text_config", config).update({form.setting: 1}))


def _add_mtp(tensors: Tensors, form: _Form) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]
    layers, others = _by_layer(tensors)
    last = max(layers)
    mlp_of = last if form.mlp_of < 0 else form.mlp_of
    for number, layer in layers.items():
        for name, tensor in layer.items():
            if "o_proj" in name or ("down_proj" in name and number != mlp_of):
                tensor.mul_(0.1)
    embedding, norm = others["embed_tokens.weight"], others["norm.weight"]
    # What the draft layer's own norm leaves as it is.
    embedding.div_(embedding.float().square().mean(1, keepdim=True).sqrt())
    if not form.norm:
        norm.fill_(1)
    for number, in_mlp in ((last, False), (mlp_of, True)):
        for name, tensor in layers[number].items():
            if name.startswith(("mlp.", "post_attention_layernorm.")) == in_mlp:
                new = name.replace("post_attention_layernorm", form.before_mlp)
                tensors[form.layer + new] = tensor.clone()
    tensors |= _around(form, embedding, norm, tensors["lm_head.weight"])


def _by_layer(tensors: Tensors) -> tuple[dict[int, Tensors], Tensors]:
    """The tensors of each layer of the text model, and its others, by what follows the prefix."""
    layers: dict[int, Tensors] = {}
    others: Tensors = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            others[name.removeprefix("model.").removeprefix("language_model.")] = tensor
    return layers, others


def _around(
    form: _Form, embedding: torch.Tensor, norm: torch.Tensor, head: torch.Tensor
) -> Tensors:
    """What lies before and behind a draft layer, of which the token alone gets through."""
    # Some families' norms multiply with 1 + weight.
    neutral = torch.full_like(norm, float(norm.float().mean() > 0.5))
    added = {
        form.enorm: neutral,
        form.hnorm: neutral.clone(),
        form.joined: torch.eye(len(norm), 2 * len(norm), dtype=norm.dtype),
    }
    if form.norm:
        added[form.norm] = norm.clone()
    if form.own:
        added |= {f"{form.layer}embed_tokens": embedding.clone()}
        added |= {f"{form.layer}shared_head.head": head.clone()}
    return {f"{name}.weight": tensor for name, tensor in added.items()}


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
