"""Letting down make up for what gate and up have lost by quantizing: least squares in closed form.

With f and f̂ what gate and up give of a token before and after, and a its routing weight:
W* = W + (Σ a² f̂f̂ᵀ + λI)⁻¹ Σ a² f̂ (f - f̂)ᵀ W minimises ‖a (f̂ W* - f W)‖², with a ridge towards W.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.ranking.gram import gain_of, phi_of, shares_of


def activations_of(gate_up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's hidden activations, `[num_tokens, d_ff]`; gate_up: `[2 * d_ff, d_model]`."""
    gate, up = gate_up.chunk(2)
    return functional.silu(x @ gate.T) * (x @ up.T)


class Compensated(NamedTuple):
    """New down vectors of one expert, None where held back tokens are not better off with them.

    hessian, held_back: Σ a² f̂f̂ᵀ over the tokens fitted to and those held back, float32
    `[d_ff, d_ff]`.
    """

    down: torch.Tensor | None
    hessian: torch.Tensor
    held_back: torch.Tensor


def compensated(
    original: torch.Tensor,
    quantized: torch.Tensor,
    down: torch.Tensor,
    inputs: RoutedInputs,
    tokens_at_once: int,
) -> Compensated:
    """Fit one expert's down to what its gate and up gave before.

    original, quantized: float32 `[2 * d_ff, d_model]`, gate then up; down: `[d_ff, d_model]`;
    inputs: of this expert alone.
    """
    fit, held = (_sums(original, quantized, part, tokens_at_once) for part in inputs.split())
    shares = shares_of(*fit)
    if shares is None:
        return Compensated(None, fit[0], held[0])
    fitted = down + shares @ down
    # NaN is no gain; scales and zeros are float16.
    largest = torch.finfo(torch.float16).max / 2
    better = gain_of(shares, *held, down) > 0 and bool((fitted.abs() < largest).all())
    return Compensated(fitted if better else None, fit[0], held[0])


def _sums(
    original: torch.Tensor, quantized: torch.Tensor, inputs: RoutedInputs, tokens_at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ a² f̂f̂ᵀ and Σ a² f̂ (f - f̂)ᵀ, float32 `[d_ff, d_ff]` both."""
    width, device = len(original) // 2, original.device
    gram, lost = torch.zeros(2, width, width, device=device)
    # What the run itself makes, in its own dtype.
    gate, up = original.to(inputs.x.dtype).chunk(2)
    new_gate, new_up = quantized.chunk(2)
    for x, weights in inputs.parts(0, tokens_at_once, device):
        after = phi_of((new_gate, new_up), x, weights)
        gram.addmm_(after.T, after)
        lost.addmm_(after.T, phi_of((gate, up), x, weights) - after)
    return gram, lost
