"""Fitting the kept micro-experts of a layer to what the whole layer still lacks.

Refitting lets each expert make up for itself alone. What then is left, R = y - ŷ of all experts of
the layer, the shared one too, the others can make up for in part: one after another takes
ΔW = (Ĝ + λI)⁻¹ φ̂ᵀR over its own tokens, and R becomes R - φ̂ΔW. Tokens that are held back judge each
step: where they are not better off, it is not taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.judging import Whole
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.gram import MIN_TOKENS, TOKENS_AT_ONCE, WIDEST, phi_of, ridge_solve


@dataclass(frozen=True)
class Part:
    """The routed experts of a layer, or its shared one.

    rows: what is kept of them, whose down is changed in place; inputs: what each was given; scale:
    what the layer multiplies their output by.
    """

    rows: RaggedTier[torch.Tensor]
    inputs: RoutedInputs
    scale: float


def fit_to_whole(
    whole: Whole,
    routed: RaggedTier[torch.Tensor],
    shared: RaggedTier[torch.Tensor] | None,
    rounds: int,
    stored: torch.dtype,
) -> list[set[int]]:
    """Let what is left of the routed experts and of the shared one give the same (`sweep`)."""
    parts = [Part(routed, whole.inputs, whole.scale)]
    if shared and whole.of_shared:
        parts.append(Part(shared, whole.of_shared, 1.0))
    return sweep(parts, whole.lacking(routed, shared), rounds, stored)


def sweep(
    parts: Sequence[Part], residual: torch.Tensor, rounds: int, stored: torch.dtype
) -> list[set[int]]:
    """Fit every expert of a layer to its residual, so many times; by part, which have changed.

    residual: float32 `[num_tokens, d_model]` on the device, what the kept experts lack of what all
    gave; changed in place. stored: the dtype that the checkpoint has down in.
    """
    changed: list[set[int]] = [set() for _ in parts]
    split = [part.inputs.split() for part in parts]
    for _ in range(rounds):
        for part, (fitting, held), own in zip(parts, split, changed, strict=True):
            for expert in range(len(part.rows.offsets) - 1):
                fitted = _fitted(part, fitting, residual, expert, stored)
                if fitted is None:
                    continue
                down = part.rows.down[part.rows.rows(expert)]
                change = fitted.float() - down.to(residual)
                if _gain(part, held, residual, expert, change) > 0:
                    down.copy_(fitted)
                    own.add(expert)
                    for phi, tokens in _coefficients(part, part.inputs, expert, residual.device):
                        residual.index_add_(0, tokens, phi @ change, alpha=-1)
    return changed


def _fitted(
    part: Part, inputs: RoutedInputs, residual: torch.Tensor, expert: int, stored: torch.dtype
) -> torch.Tensor | None:
    """W + ΔW of one expert, as its dtypes hold it; None where nothing can be fitted."""
    rows = part.rows.rows(expert)
    width = rows.stop - rows.start
    if not 0 < width <= WIDEST or len(inputs.tokens[expert]) < MIN_TOKENS:
        return None
    gram = residual.new_zeros(width, width)
    cross = residual.new_zeros(width, residual.shape[1])
    for phi, tokens in _coefficients(part, inputs, expert, residual.device):
        gram.addmm_(phi.T, phi)
        cross.addmm_(phi.T, residual[tokens])
    delta = ridge_solve(gram.double(), cross.double())
    if delta is None:
        return None
    down = part.rows.down[rows].to(residual)
    fitted = (down + delta.float()).to(stored).to(part.rows.down.dtype)
    return fitted if bool(fitted.isfinite().all()) else None


def _gain(
    part: Part, held: RoutedInputs, residual: torch.Tensor, expert: int, change: torch.Tensor
) -> float:
    """By how much ‖R‖² of the tokens held back falls; NaN where it is no number."""
    gain = 0.0
    for phi, tokens in _coefficients(part, held, expert, residual.device):
        taken = phi @ change
        less = taken * (2 * residual[tokens] - taken)
        gain += float(less.sum(dtype=torch.float64))
    return gain


def _coefficients(
    part: Part, inputs: RoutedInputs, expert: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """φ̂ of an expert's tokens, `[some_tokens, width]`, and which tokens they are."""
    rows = part.rows.rows(expert)
    own = part.rows.gate[rows].to(device), part.rows.up[rows].to(device)
    several = inputs.tokens[expert].split(TOKENS_AT_ONCE)
    batches = inputs.parts(expert, TOKENS_AT_ONCE, device)
    for tokens, (x, weights) in zip(several, batches, strict=True):
        yield part.scale * phi_of(own, x, weights), tokens.to(device)
