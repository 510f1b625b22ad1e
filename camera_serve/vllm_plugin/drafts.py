"""Layers that guess the next tokens: outside the layout, dense, and vLLM's own method's.

A model may bring some (multi-token prediction), or another checkpoint has them (EAGLE). vLLM builds
both with the quantization method of the model that they draft for.
"""

import re
from collections.abc import Iterable

from vllm.config import VllmConfig

DRAFT_MODEL = "draft_model."
"""What vLLM puts before all names of a whole model that drafts for another one."""


def draft_layers(carried: Iterable[str]) -> frozenset[str]:
    """Prefixes of the MoE layers (`mtp.layers.0.mlp`) that have experts among these tensors.

    carried: the names of a checkpoint's tensors that are not of the model itself.
    """
    return frozenset(name.split(".experts.")[0] for name in carried if ".experts." in name)


def why_no_draft(
    moe_prefix: str, num_layers: int, stored: frozenset[str] | None, config: VllmConfig
) -> str | None:
    """Why a MoE layer outside the layout cannot be served dense, and the remedy; None if it can.

    num_layers: how many the model has; stored: its `draft_layers`, None if there are no weights.
    """
    if not _is_named_as_draft(moe_prefix, num_layers):
        return (
            "Start without the flag that adds or renames layers (--model-impl, "
            "--model-class-overrides, --speculative-config)"
        )
    if stored is None or moe_prefix in stored or _draft_is_elsewhere(config):
        return None
    return (
        "It would draft tokens, and the checkpoint has no weights for it. Start without "
        "--speculative-config, or compress an original that has them"
    )


def _is_named_as_draft(moe_prefix: str, num_layers: int) -> bool:
    """Draft layers go on counting where the model's own end, or are below `mtp`."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", moe_prefix)
    past_the_end = layer is not None and int(layer[1]) >= num_layers
    return past_the_end or "mtp" in moe_prefix.split(".")


def _draft_is_elsewhere(config: VllmConfig) -> bool:
    """Whether --speculative-config names another checkpoint, where the layer's weights are."""
    draft = config.speculative_config and config.speculative_config.draft_model_config
    return bool(draft) and draft.model != config.model_config.model
