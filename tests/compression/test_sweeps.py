"""Fitting a layer to what it lacks as a whole, against least squares written apart."""

import pytest
import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression import sweeps
from camera_serve.compression.sweeps import Part, sweep
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.gram import RIDGE

D_MODEL, WIDTHS, TOKENS = 12, (6, 0, 9), 800


def _part(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Part:
    """Three experts, one without micro-experts; every token goes to two of them."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(sum(WIDTHS), D_MODEL, generator=generator) for _ in range(3))
    rows = RaggedTier(gate.to(dtype), up.to(dtype), down.to(dtype), (0, 6, 6, 15))
    x = torch.randn(TOKENS, D_MODEL, generator=generator).to(dtype)
    every = torch.arange(TOKENS)
    tokens = (every[every % 3 != 0], every[every % 3 != 1], every[every % 3 != 2])
    weights = tuple(torch.rand(len(own), generator=generator) for own in tokens)
    return Part(rows, RoutedInputs(x, tokens, weights), scale)


def _phi(part: Part, expert: int) -> torch.Tensor:
    rows, x = part.rows.rows(expert), part.inputs.x[part.inputs.tokens[expert]].double()
    gate, up = part.rows.gate[rows].double(), part.rows.up[rows].double()
    weights = part.scale * part.inputs.weights[expert].double()
    return functional.silu(x @ gate.T) * (x @ up.T) * weights[:, None]


def _lacking(part: Part) -> torch.Tensor:
    """What other down vectors of the same experts would give beside these."""
    residual = torch.zeros(TOKENS, D_MODEL, dtype=torch.float64)
    for expert, width in enumerate(WIDTHS):
        noise = torch.randn(width, D_MODEL, generator=torch.Generator().manual_seed(expert)) / 5
        residual.index_add_(0, part.inputs.tokens[expert], _phi(part, expert) @ noise.double())
    return residual.float()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_each_expert_takes_its_ridge_regression_on_what_is_left(scale: float) -> None:
    part = _part(scale)
    residual, down = _lacking(part), part.rows.down.clone().double()
    left = residual.double()
    border = TOKENS - TOKENS // 8
    for expert in (0, 2):
        tokens, phi = part.inputs.tokens[expert], _phi(part, expert)
        fitting = tokens < border
        gram = phi[fitting].T @ phi[fitting]
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        change = torch.linalg.solve(gram, phi[fitting].T @ left[tokens[fitting]])
        down[part.rows.rows(expert)] += change
        left.index_add_(0, tokens, phi @ change, alpha=-1)
    assert sweep([part], residual, 1, torch.float32) == [{0, 2}]
    torch.testing.assert_close(part.rows.down.double(), down, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residual.double(), left, rtol=1e-3, atol=1e-4)


def test_more_rounds_leave_less_on_tokens_held_back() -> None:
    left = []
    for rounds in (0, 1, 3):
        part = _part()
        residual = _lacking(part)
        sweep([part], residual, rounds, torch.float32)
        left.append(float(residual[-TOKENS // 8 :].square().sum()))
    assert left[0] > 2 * left[1] > 2 * left[2]


def test_what_held_back_tokens_are_not_better_off_with_is_not_taken() -> None:
    part = _part()
    residual, down = _lacking(part), part.rows.down.clone()
    residual[-TOKENS // 8 :] *= -1
    before = residual.clone()
    assert sweep([part], residual, 2, torch.float32) == [set()]
    assert part.rows.down.equal(down) and residual.equal(before)


def test_a_fit_beyond_the_dtype_it_is_stored_in_is_not_taken() -> None:
    part = _part()
    residual = 1e7 * _lacking(part)
    assert sweep([part], residual.clone(), 1, torch.float16) == [set()]
    assert sweep([part], residual.clone(), 1, torch.float32) == [{0, 2}]


def test_experts_that_saw_few_tokens_or_are_too_wide_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _part()
    few = RoutedInputs(
        part.inputs.x,
        (part.inputs.tokens[0][:20], *part.inputs.tokens[1:]),
        (part.inputs.weights[0][:20], *part.inputs.weights[1:]),
    )
    assert sweep([Part(part.rows, few, 1.0)], _lacking(part), 1, torch.float32) == [{2}]
    monkeypatch.setattr(sweeps, "WIDEST", 8)
    assert sweep([_part()], _lacking(part), 1, torch.float32) == [{0}]


def test_what_is_stored_is_what_the_residual_was_made_of() -> None:
    part = _part(dtype=torch.bfloat16)
    residual, before = _lacking(part), part.rows.down.clone()
    start = residual.clone()
    sweep([part], residual, 2, torch.bfloat16)
    for expert in (0, 2):
        rows = part.rows.rows(expert)
        change = part.rows.down[rows].float() - before[rows].float()
        for phi, tokens in sweeps._coefficients(part, part.inputs, expert, start.device):
            start.index_add_(0, tokens, phi @ change, alpha=-1)
    torch.testing.assert_close(residual, start, rtol=1e-4, atol=1e-4)
