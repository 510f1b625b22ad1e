import math

import pytest
import torch

from bench.perplexity import Score


def test_perplexity_weighs_tokens_not_windows() -> None:
    score = Score(nll=torch.tensor([10.0, 1.0]).double(), tokens=torch.tensor([10.0, 1.0]).double())
    assert score.perplexity == pytest.approx(math.e)


def test_log_ratio_of_equal_models_is_zero_without_error() -> None:
    score = Score(torch.tensor([3.0, 5.0]).double(), torch.tensor([2.0, 2.0]).double())
    assert score.log_ratio(score) == (0.0, 0.0)


def test_log_ratio_is_the_log_of_the_ratio_of_perplexities() -> None:
    tokens = torch.tensor([4.0, 2.0, 3.0]).double()
    first = Score(torch.tensor([9.0, 4.0, 7.0]).double(), tokens)
    second = Score(torch.tensor([8.0, 5.0, 5.0]).double(), tokens)
    mean, _ = first.log_ratio(second)
    assert mean == pytest.approx(math.log(first.perplexity / second.perplexity))


def test_standard_error_is_that_of_the_mean_for_equal_windows() -> None:
    # Per-token differences 1, 2, 3: standard deviation 1, standard error 1/sqrt(3).
    tokens = torch.full((3,), 5.0).double()
    base = Score(torch.zeros(3).double(), tokens)
    other = Score(torch.tensor([5.0, 10.0, 15.0]).double(), tokens)
    mean, error = other.log_ratio(base)
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(1 / math.sqrt(3))
