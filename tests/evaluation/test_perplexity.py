import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from camera_serve.evaluation.perplexity import Score, divergence, likelihood


def test_the_mean_weighs_tokens_not_windows() -> None:
    score = Score(
        total=torch.tensor([10.0, 1.0]).double(), tokens=torch.tensor([10.0, 1.0]).double()
    )
    assert score.mean == pytest.approx(1)


def test_equal_models_differ_by_zero_without_error() -> None:
    score = Score(torch.tensor([3.0, 5.0]).double(), torch.tensor([2.0, 2.0]).double())
    assert score.difference(score) == (0.0, 0.0)


def test_the_difference_is_that_of_the_means() -> None:
    tokens = torch.tensor([4.0, 2.0, 3.0]).double()
    first = Score(torch.tensor([9.0, 4.0, 7.0]).double(), tokens)
    second = Score(torch.tensor([8.0, 5.0, 5.0]).double(), tokens)
    mean, _ = first.difference(second)
    assert mean == pytest.approx(first.mean - second.mean)


def test_standard_error_is_that_of_the_mean_for_equal_windows() -> None:
    # Per-token differences 1, 2, 3: standard deviation 1, standard error 1/sqrt(3).
    tokens = torch.full((3,), 5.0).double()
    base = Score(torch.zeros(3).double(), tokens)
    other = Score(torch.tensor([5.0, 10.0, 15.0]).double(), tokens)
    mean, error = other.difference(base)
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(1 / math.sqrt(3))


class Fixed(torch.nn.Module):
    """Predicts the same distribution after every token."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self._logits = torch.tensor(probabilities).log()

    def forward(self, window: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self._logits.expand(*window.shape, -1))


def test_divergence_is_that_of_the_dense_predictions_from_ours() -> None:
    window = torch.tensor([[0, 1, 0, 1]])
    ours, dense = Fixed([0.25, 0.75]), Fixed([0.5, 0.5])
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = divergence(cast(Any, ours), cast(Any, dense), [window])
    assert found.tokens.tolist() == [3]
    assert found.mean == pytest.approx(wanted)
    assert divergence(cast(Any, dense), cast(Any, dense), [window]).mean == 0


def test_likelihood_is_that_of_the_tokens_after_the_first() -> None:
    model = cast(Any, Fixed([0.25, 0.75]))
    found = likelihood(model, [torch.tensor([[1, 0, 0, 1]])])
    assert found.mean == pytest.approx(-(2 * math.log(0.25) + math.log(0.75)) / 3)
