"""Down vectors that make up for quantized gate and up, against least squares on the tokens."""

import pytest
import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.compensation import compensated
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
