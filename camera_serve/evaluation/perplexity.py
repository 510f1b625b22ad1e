"""Perplexity and divergence over windows of a text, and paired comparisons on the same windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import camera_serve.hf  # noqa: F401  (from_pretrained then knows compressed checkpoints)
from camera_serve.models.building import model_class

WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """What a model's predictions of a text cost, in nats.

    total: float64 `[num_windows]`, summed over the predicted tokens of each window; tokens:
    `[num_windows]`, how many those are.
    """

    total: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean(self) -> float:
        """Nats per predicted token, over all windows."""
        return float(self.total.sum() / self.tokens.sum())

    def difference(self, other: "Score") -> tuple[float, float]:
        """How far this mean is above another's, and its standard error, paired over windows.

        The error is that of a ratio estimator: windows are the sampling units, tokens the weights.
        """
        difference = self.total - other.total
        total = self.tokens.sum()
        mean = difference.sum() / total
        residual = difference - mean * self.tokens
        count = len(residual)
        variance = residual.square().sum() * count / max(count - 1, 1)
        return float(mean), float(variance.sqrt() / total)


def load_model(path: Path) -> PreTrainedModel:
    """A dense or compressed checkpoint in float32, so that no rounding hides a small difference."""
    logging.disable_progress_bar()
    model_of = model_class(AutoConfig.from_pretrained(path))
    model: PreTrainedModel = model_of.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def windows_of(path: Path, text: Path) -> list[torch.Tensor]:
    """All tokens of `text` under the tokenizer at `path`: int64 `[1, <= WINDOW]`, in order."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids
    return [window for window in ids.split(WINDOW, dim=1) if window.shape[1] > 1]


@torch.inference_mode()
def likelihood(model: PreTrainedModel, windows: list[torch.Tensor]) -> Score:
    """Negative log-likelihood: perplexity is exp of its mean, a difference of two the log ratio.

    Every window is run on its own; its first token has no prediction.
    """
    return _score(windows, lambda window: _cross_entropy(_logits(model, window), window[0, 1:]))


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, dense: PreTrainedModel, windows: list[torch.Tensor]
) -> Score:
    """KL divergence of the model's predictions from the dense model's, at the same positions.

    Unlike perplexity it cannot fall by losing what the dense model had learned wrongly.
    """
    return _score(windows, lambda w: _divergence(_logits(model, w), _logits(dense, w)))


@dataclass(frozen=True)
class Cost:
    """What a model costs on a text: its likelihood, and how far it is from the dense model."""

    likelihood: Score
    divergence: Score


@torch.inference_mode()
def costs(
    models: Sequence[PreTrainedModel], dense: PreTrainedModel, windows: list[torch.Tensor]
) -> list[Cost]:
    """`likelihood` and `divergence` of several models, the dense one run once for all of them."""
    likelihoods = torch.zeros(len(models), len(windows), dtype=torch.float64)
    divergences = torch.zeros_like(likelihoods)
    for number, window in enumerate(windows):
        wanted = _logits(dense, window)
        for which, model in enumerate(models):
            found = _logits(model, window)
            likelihoods[which, number] = _cross_entropy(found, window[0, 1:])
            divergences[which, number] = _divergence(found, wanted)
    tokens = torch.tensor([window.shape[1] - 1 for window in windows], dtype=torch.float64)
    return [
        Cost(Score(likely, tokens), Score(away, tokens))
        for likely, away in zip(likelihoods, divergences, strict=True)
    ]


def _score(windows: list[torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor]) -> Score:
    tokens = [window.shape[1] - 1 for window in windows]
    totals = torch.stack([total(window) for window in windows]).double()
    return Score(totals, torch.tensor(tokens, dtype=torch.float64))


def _logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(window, use_cache=False).logits[0, :-1]
    return logits


def _cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, wanted, reduction="sum")


def _divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True)
