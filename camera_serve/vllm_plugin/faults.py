"""What stock vLLM answers wrongly, of a dense model just the same: said when a server starts."""

import logging
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig

from camera_serve.checkpoint.reader import Checkpoint

_LEFT_OUT = {
    "phimoe": (False, "lm_head.bias", "it does not add the bias of the head (lm_head.bias)"),
    "laguna": (False, "e_score_correction_bias", "its loader drops the biases of the router"),
    "ernie4_5_moe": (
        True,
        "e_score_correction_bias",
        "its router there leaves the biases of softmax scores out",
    ),
}
"""By model type: whether on a CPU alone, how the tensors end, and what vLLM does with them."""

_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe_lite")

_logger = logging.getLogger(__name__)


def warn_of_faults(config: PreTrainedConfig, folder: Path, *, on_cpu: bool) -> None:
    """Log what this vLLM is known to compute otherwise than transformers, of this model.

    folder: where the weights are; a folder without any is not asked for values.
    """
    for only_there, what in _faults(config, folder, on_cpu):
        where = " on a CPU" if only_there else ""
        elsewhere = "a GPU is not affected" if only_there else "transformers is not affected"
        _logger.warning(
            "camera-serve: stock vLLM answers this model wrongly%s, compressed or not: %s; %s",
            where,
            what,
            elsewhere,
        )


def _faults(config: PreTrainedConfig, folder: Path, on_cpu: bool) -> Iterator[tuple[bool, str]]:
    only_on_cpu, ending, what = _LEFT_OUT.get(config.model_type, (True, "", ""))
    if ending and (on_cpu or not only_on_cpu) and _holds_values(folder, ending):
        yield only_on_cpu, what
    text = config.get_text_config()
    if not on_cpu or text.num_attention_heads == 1:
        return
    if config.model_type == "lfm2_moe":
        yield True, "its rotary embedding there turns the first head alone"
    rope = getattr(text, "rope_parameters", None) or {}
    if config.model_type in _LATENT and rope.get("rope_type", "default") == "default":
        yield True, "plain rotary tables of latent attention are applied wrongly there"


def _holds_values(folder: Path, ending: str) -> bool:
    """Whether a tensor of such a name is not all zeros."""
    checkpoint = Checkpoint.open_unchecked(folder)
    names = (name for name in checkpoint.entries if name.endswith(ending))
    return any(bool(checkpoint.get(name).any()) for name in names)
