"""Letting down make up for what gate and up have lost by quantizing: least squares in closed form.

With f and f̂ what gate and up give of a token before and after, and a its routing weight:
W* = W + (Σ a² f̂f̂ᵀ + λI)⁻¹ Σ a² f̂ (f - f̂)ᵀ W minimises ‖a (f̂ W* - f W)‖², with a ridge towards W.
"""

import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.ranking.gram import ridge_solve


def activations_of(gate_up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's hidden activations, `[num_tokens, d_ff]`; gate_up: `[2 * d_ff, d_model]`."""
    gate, up = gate_up.chunk(2)
    return functional.silu(x @ gate.T) * (x @ up.T)


def compensated(
    original: torch.Tensor,
    quantized: torch.Tensor,
    down: torch.Tensor,
    inputs: RoutedInputs,
    tokens_at_once: int,
) -> torch.Tensor | None:
    """New down vectors of one expert; None where held back tokens are not better off with them.

    original, quantized: float32 `[2 * d_ff, d_model]`, gate then up; down: `[d_ff, d_model]`;
    inputs: of this expert alone.
    """
    fitting, held = inputs.split()
    width = len(down)
    moments, losses = torch.zeros(2, width, width, dtype=torch.float64, device=down.device)
    for x, weights in fitting.batches(0, tokens_at_once, down.device):
        before = activations_of(original, x) * weights[:, None]
        after = activations_of(quantized, x) * weights[:, None]
        moments += after.T @ after
        losses += after.T @ (before - after)
    change = ridge_solve(moments, losses @ down.double())
    if change is None:
        return None
    fitted = down + change.float()
    gain = 0.0
    for x, weights in held.batches(0, tokens_at_once, down.device):
        wanted, after = activations_of(original, x) @ down, activations_of(quantized, x)
        for sign, candidate in ((1, down), (-1, fitted)):
            error = (after @ candidate - wanted) * weights[:, None]
            gain += sign * float(error.square().sum(dtype=torch.float64))
    # NaN is no gain.
    return fitted if gain >= 0 and bool(fitted.isfinite().all()) else None
