"""Perplexity over windows of a text, and paired comparisons of two models on the same windows."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import camera_serve.hf  # noqa: F401  (from_pretrained then knows compressed checkpoints)

WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihoods `[num_windows]` float64 and predicted tokens per window."""

    nll: torch.Tensor
    tokens: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all predicted tokens."""
        return math.exp(float(self.nll.sum() / self.tokens.sum()))

    def log_ratio(self, other: "Score") -> tuple[float, float]:
        """log(perplexity / other's perplexity) and its standard error, paired over windows.

        The error is that of a ratio estimator: windows are the sampling units, tokens the weights.
        """
        difference = self.nll - other.nll
        total = self.tokens.sum()
        mean = difference.sum() / total
        residual = difference - mean * self.tokens
        count = len(residual)
        variance = residual.square().sum() * count / max(count - 1, 1)
        return float(mean), float(variance.sqrt() / total)


def load_model(path: Path) -> PreTrainedModel:
    """A dense or compressed checkpoint in float32, so that no rounding hides a small difference."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def windows_of(path: Path, text: Path) -> list[torch.Tensor]:
    """All tokens of `text` under the tokenizer at `path`: int64 `[1, <= WINDOW]`, in order."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids
    return [window for window in ids.split(WINDOW, dim=1) if window.shape[1] > 1]


@torch.inference_mode()
def score(model: PreTrainedModel, windows: list[torch.Tensor]) -> Score:
    """Run every window on its own; the first token of a window has no prediction."""
    nll, tokens = [], []
    for window in windows:
        logits = model(window, use_cache=False).logits[0, :-1]
        nll.append(functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        tokens.append(window.shape[1] - 1)
    return Score(torch.stack(nll).double(), torch.tensor(tokens, dtype=torch.float64))
