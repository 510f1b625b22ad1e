"""Fitting what is left of an expert to what the whole expert gave: least squares in closed form.

What the kept micro-experts make of a token, φ_K, is not independent of what the removed ones made,
φ_R: so new down vectors W* of the kept ones take over a part of their work. They minimise
‖φ_K W* - φ W‖² over the calibration tokens, with a ridge towards the old ones:
W* = W_K + (G_KK + λI)⁻¹ G_KR W_R, with G = Σ φφᵀ. Tokens that are held back judge: where they are
not better off, or there are none, the old down vectors stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ragged.layout import rank
from camera_serve.ranking.elimination import eliminate, shrunk
from camera_serve.ranking.gram import MIN_TOKENS, WIDEST, gain_of, gram_of, shares_of


@dataclass(frozen=True)
class Refitted:
    """New down vectors of each expert's kept micro-experts, `[num_kept, d_model]`.

    kept: int64 indices into each expert, by falling energy; down: None for an expert that is left
    as it is; refused: experts whose held back tokens, or whose dtype, the new ones did not suit.
    """

    kept: list[torch.Tensor]
    down: list[torch.Tensor | None]
    refused: tuple[int, ...]


def refit_experts(
    experts: RaggedTier[torch.Tensor],
    kept: Sequence[torch.Tensor],
    inputs: RoutedInputs,
    device: torch.device,
    *,
    stored: torch.dtype | None = None,
    choosing: bool = False,
) -> Refitted:
    """Fit the kept micro-experts of each expert to what all of them gave.

    experts: all 16-bit rows; kept[e]: int64 indices into expert e; inputs: what each was given;
    stored: the dtype that the checkpoint has them in, None for that of `experts`; choosing: as many
    as `kept` has, but those of them that elimination leaves on these tokens.
    """
    fitting, held = inputs.split()
    found: list[torch.Tensor | None] = []
    chosen, refused = list(kept), []
    for expert, indices in enumerate(kept):
        span = experts.rows(expert)
        width, num_tokens = span.stop - span.start, len(fitting.tokens[expert])
        if not 0 < len(indices) < width <= WIDEST or num_tokens < MIN_TOKENS:
            found.append(None)
            continue
        gate, up, down = (
            matrix[span].to(device) for matrix in (experts.gate, experts.up, experts.down)
        )
        fit, judge = (gram_of((gate, up), part, expert, device) for part in (fitting, held))
        if choosing:
            gram = shrunk(fit + judge, len(inputs.tokens[expert]))
            chosen[expert] = _last_out(gram, down, indices)
        fitted, gain = refit_down(fit, judge, down, chosen[expert].to(device))
        if fitted is not None:
            fitted = fitted.to(stored or experts.down.dtype).to(experts.down.dtype)
            # NaN is no gain.
            if not (gain > 0 and fitted.isfinite().all()):
                fitted = None
                refused.append(expert)
        found.append(fitted)
    return Refitted(chosen, found, tuple(refused))


def _last_out(gram: torch.Tensor, down: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """As many micro-experts of one expert as `kept`, those that elimination leaves.

    By falling energy, on the CPU; `kept` itself where elimination is not possible.
    """
    (order,), (costs,) = eliminate(gram[None], down[None])
    if not costs.isfinite().all():
        return kept
    stay = order[-len(kept) :].sort().values
    norms = torch.linalg.vector_norm(down[stay], dim=1, dtype=torch.float64)
    return stay[rank(gram.diagonal()[stay] * norms.square())].cpu()


def refit_down(
    gram: torch.Tensor, judge: torch.Tensor, down: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """Down vectors of the kept micro-experts that make up for the removed ones.

    gram, judge: `[d_ff, d_ff]`, Σ φφᵀ of one expert over the tokens to fit to and over those held
    back; down: `[d_ff, d_model]`; kept: int64 indices. Returns `[num_kept, d_model]`, and by how
    much the error on the tokens held back falls; None where nothing can be fitted: nothing is kept
    or removed, or no kept micro-expert did anything.
    """
    others = torch.ones(len(down), dtype=torch.bool, device=down.device)
    others[kept] = False
    removed = others.nonzero().squeeze(1)
    own = gram[kept]
    shares = shares_of(own[:, kept], own[:, removed]) if len(removed) else None
    if shares is None:
        return None, 0.0
    gone, judged = down[removed], judge[kept]
    gain = gain_of(shares, judged[:, kept], judged[:, removed], gone)
    fitted = down[kept].to(shares) + shares @ gone.to(shares)
    return fitted.to(down.dtype), gain
