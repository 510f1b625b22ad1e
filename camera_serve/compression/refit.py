"""Fitting what is left of an expert to what the whole expert gave: least squares in closed form.

What the kept micro-experts make of a token, φ_K, is not independent of what the removed ones made,
φ_R: so new down vectors W* of the kept ones take over a part of their work. They minimise
‖φ_K W* - φ W‖² over the calibration tokens, with a ridge towards the old ones:
W* = W_K + (G_KK + λI)⁻¹ G_KR W_R, with G = Σ φφᵀ. Tokens that are held back judge: where they are
not better off, the old down vectors stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.gram import (
    MIN_TOKENS,
    TOKENS_AT_ONCE,
    WIDEST,
    GateUp,
    gram_of,
    phi_of,
    ridge_solve,
)


@dataclass(frozen=True)
class Refitted:
    """New down vectors of each expert's kept micro-experts, float32 `[num_kept, d_model]`.

    None for an expert that is left as it is; `refused`: experts whose held back tokens, or whose
    dtype, the new ones did not suit.
    """

    down: list[torch.Tensor | None]
    refused: tuple[int, ...]


def refit_experts(
    experts: RaggedTier[torch.Tensor],
    kept: Sequence[torch.Tensor],
    inputs: RoutedInputs,
    device: torch.device,
) -> Refitted:
    """Fit the kept micro-experts of each expert to what all of them gave.

    experts: all 16-bit rows; kept[e]: int64 indices into expert e; inputs: what each was given.
    """
    fitting, held = inputs.split()
    found: list[torch.Tensor | None] = []
    refused = []
    for expert, indices in enumerate(kept):
        span = experts.rows(expert)
        width, num_tokens = span.stop - span.start, len(fitting.tokens[expert])
        if not 0 < len(indices) < width <= WIDEST or num_tokens < MIN_TOKENS:
            found.append(None)
            continue
        gate, up, down = (
            matrix[span].to(device, torch.float32)
            for matrix in (experts.gate, experts.up, experts.down)
        )
        own, rows = (gate, up), indices.to(device)
        fitted = refit_down(gram_of(own, fitting, expert, device), down, rows)
        if fitted is not None:
            fitted = fitted.to(experts.down.dtype).float()
            before, after = _errors(own, down, rows, (down[rows], fitted), held, expert)
            if not (fitted.isfinite().all() and after <= before):
                fitted = None
                refused.append(expert)
        found.append(fitted)
    return Refitted(found, tuple(refused))


def refit_down(gram: torch.Tensor, down: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
    """Down vectors of the kept micro-experts that make up for the removed ones.

    gram: float64 `[d_ff, d_ff]`, Σ φφᵀ of one expert; down: `[d_ff, d_model]`; kept: int64 indices.
    Returns float64 `[num_kept, d_model]`; None where nothing can be fitted: nothing is kept or
    removed, or no kept micro-expert did anything.
    """
    removed = torch.ones(len(down), dtype=torch.bool, device=down.device)
    removed[kept] = False
    if not removed.any():
        return None
    wanted = gram[kept][:, removed] @ down[removed].double()
    change = ridge_solve(gram[kept][:, kept], wanted)
    return None if change is None else down[kept].double() + change


def _errors(
    gate_up: GateUp,
    down: torch.Tensor,
    kept: torch.Tensor,
    candidates: tuple[torch.Tensor, ...],
    inputs: RoutedInputs,
    expert: int,
) -> list[float]:
    """‖φ_K W - φ down‖² of each candidate W over an expert's tokens."""
    errors = [0.0] * len(candidates)
    for x, weights in inputs.batches(expert, TOKENS_AT_ONCE, down.device):
        phi = phi_of(gate_up, x, weights)
        wanted, own = phi @ down, phi[:, kept]
        for number, candidate in enumerate(candidates):
            errors[number] += float((own @ candidate - wanted).square().sum(dtype=torch.float64))
    return errors
