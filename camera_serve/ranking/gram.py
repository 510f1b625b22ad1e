"""Gram matrices of coefficients: what micro-experts of one expert do together."""

import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.ranking.energy import coefficients

MIN_TOKENS = 32
"""Experts that saw fewer tokens are left as they are: their Gram matrix would say too little."""

WIDEST = 8192
"""Wider experts have none: the Gram matrix of this many takes 0.5 GB in float64."""

TOKENS_AT_ONCE = 4096

RIDGE = 0.01
"""λ of a fit, as a share of the mean of the Gram's diagonal: .001 to .01 are alike, .1 is worse."""

GateUp = tuple[torch.Tensor, torch.Tensor]


def gram_of(
    gate_up: GateUp, inputs: RoutedInputs, expert: int, device: torch.device
) -> torch.Tensor:
    """G = Σ φφᵀ over an expert's tokens, float32 `[d_ff, d_ff]`; gate, up: `[d_ff, d_model]`."""
    width = len(gate_up[0])
    gram = torch.zeros(width, width, device=device)
    for x, weights in inputs.parts(expert, TOKENS_AT_ONCE, device):
        phi = phi_of(gate_up, x, weights)
        gram.addmm_(phi.T, phi)
    return gram


def phi_of(gate_up: GateUp, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. 4 for one expert, float32 `[num_tokens, d_ff]`; products are in the dtype of gate, up."""
    gate, up = gate_up
    x = x.to(gate.dtype)
    return coefficients(functional.linear(x, gate), functional.linear(x, up), weights)


def shares_of(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor | None:
    """How φ are best made up of others φ̂, with a ridge: X of (Σ φ̂φ̂ᵀ + λI) X = Σ φ̂φᵀ.

    gram: `[n, n]`; cross: `[n, m]`. Solved in float64. Returns `[n, m]`; None where the Gram matrix
    is empty, zero or none.
    """
    found = ridge_solve(gram.double(), cross.double())
    return None if found is None else found.to(gram.dtype)


def gain_of(
    shares: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, down: torch.Tensor
) -> float:
    """By how much ‖φ̂ ΔW - φ W‖² is less for ΔW = X W than for none; NaN where it is no number.

    shares: X; gram, cross: Σ φ̂φ̂ᵀ and Σ φ̂φᵀ over the tokens that judge; down: W, `[m, d_model]`.
    """
    less, down = shares.T @ (2 * cross - gram @ shares), down.to(shares)
    return float((less * (down @ down.T)).sum(dtype=torch.float64))


def ridge_solve(gram: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """X of (G + λI) X = `wanted`, float64; None where G is empty, zero or no Gram matrix."""
    if not len(gram):
        return None
    ridge = RIDGE * gram.diagonal().mean()
    if not ridge > 0:
        return None
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + ridge * eye)
    return None if int(info) else torch.cholesky_solve(wanted, factor)
