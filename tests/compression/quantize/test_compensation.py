"""Down vectors that make up for quantized gate and up, against least squares on the tokens."""

import pytest
import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.compensation import activations_of, compensated
from camera_serve.ranking.gram import RIDGE

D_FF, D_MODEL, TOKENS = 6, 10, 400


def _expert(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    original = (torch.randn(2 * D_FF, D_MODEL, generator=generator) / 3).to(dtype).float()
    # Too small by as much everywhere: a down that is larger makes up for it.
    quantized = 0.8 * original + 0.02 * torch.randn(2 * D_FF, D_MODEL, generator=generator)
    down = torch.randn(D_FF, 5, generator=generator)
    x = torch.randn(TOKENS, D_MODEL, generator=generator).to(dtype)
    inputs = RoutedInputs(x, (torch.arange(TOKENS),), (torch.rand(TOKENS, generator=generator),))
    return original, quantized, down, inputs


def _made(gate_up: torch.Tensor, inputs: RoutedInputs) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2)
    x, (weights,) = inputs.x.double(), inputs.weights
    return functional.silu(x @ gate.T) * (x @ up.T) * weights[:, None]


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
def test_it_is_the_ridge_regression_on_the_tokens_to_fit_to(dtype, near: float) -> None:
    original, quantized, down, inputs = _expert(dtype)
    found = compensated(original, quantized, down, inputs, 64).down
    assert found is not None
    before, after = (_made(m, inputs)[: TOKENS * 7 // 8] for m in (original, quantized))
    gram = after.T @ after
    gram += RIDGE * gram.diagonal().mean() * torch.eye(D_FF, dtype=torch.float64)
    change = torch.linalg.solve(gram, after.T @ (before - after) @ down.double())
    torch.testing.assert_close(found.double(), down + change, rtol=near, atol=near)


def test_the_sums_it_comes_with_are_over_all_tokens() -> None:
    original, quantized, down, inputs = _expert()
    sums = compensated(original, quantized, down, inputs, 64)
    hessian = sums.hessian + sums.held_back
    after = _made(quantized, inputs)
    torch.testing.assert_close(hessian.double(), after.T @ after, rtol=1e-5, atol=1e-5)


def test_what_tokens_held_back_are_worse_off_with_is_refused() -> None:
    original, quantized, down, inputs = _expert()
    # On the tokens to fit to the original does nothing, on those held back it does more.
    original[:D_FF, 0], quantized[:D_FF, 0] = 4.0, 0.0
    inputs.x[:, 0] = -3.0
    inputs.x[TOKENS * 7 // 8 :, 0] = 3.0
    assert compensated(original, quantized, down, inputs, 64)[0] is None


def _noisy(tokens: int = TOKENS, down: float = 1.0):
    """An expert's gate and up, the same with noise, its down, and what it was given."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(2 * 12, 16, generator=generator) / 4
    quantized = original + 0.05 * torch.randn(2 * 12, 16, generator=generator)
    x = torch.randn(tokens, 5, generator=generator) @ torch.randn(5, 16, generator=generator)
    weights = torch.rand(tokens, generator=generator)
    inputs = RoutedInputs(x, (torch.arange(tokens),), (weights,))
    return original, quantized, down * torch.randn(12, 16, generator=generator), inputs


def _error(original, quantized, down, candidate, inputs: RoutedInputs) -> float:
    x, weights = inputs.x[inputs.tokens[0]], inputs.weights[0][:, None]
    off = activations_of(quantized, x) @ candidate - activations_of(original, x) @ down
    return float((weights * off).square().sum())


def test_held_back_tokens_are_better_off() -> None:
    original, quantized, down, inputs = _noisy()
    fitted = compensated(original, quantized, down, inputs, 64).down
    assert fitted is not None
    _, held = inputs.split()
    before = _error(original, quantized, down, down, held)
    assert _error(original, quantized, down, fitted, held) < 0.5 * before


def test_without_a_held_back_token_nothing_is_fitted() -> None:
    original, quantized, down, inputs = _noisy()
    early = RoutedInputs(inputs.x, (inputs.tokens[0][:200],), (inputs.weights[0][:200],))
    assert compensated(original, quantized, down, early, 64).down is None


@pytest.mark.parametrize("tokens", [0, 1, 7, 8])
def test_next_to_no_tokens_fit_nothing_that_is_worse(tokens: int) -> None:
    original, quantized, down, inputs = _noisy(tokens)
    fitted = compensated(original, quantized, down, inputs, 64).down
    _, held = inputs.split()
    before = _error(original, quantized, down, down, held)
    assert fitted is None or _error(original, quantized, down, fitted, held) < before


def test_down_vectors_beyond_float16_are_not_taken() -> None:
    original, quantized, down, inputs = _noisy(down=2.4e4)
    assert compensated(original, quantized, 1e-2 * down, inputs, 64).down is not None
    assert compensated(original, quantized, down, inputs, 64).down is None


@pytest.mark.parametrize("what", ["original", "down", "x"])
def test_an_expert_that_does_nothing_is_left_alone(what: str) -> None:
    original, quantized, down, inputs = _noisy()
    {"original": original, "down": down, "x": inputs.x}[what].zero_()
    if what == "original":
        quantized.zero_()
    assert compensated(original, quantized, down, inputs, 64).down is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_fit_nothing(bad: float) -> None:
    original, quantized, down, inputs = _noisy()
    inputs.x[3] = bad
    assert compensated(original, quantized, down, inputs, 64).down is None
