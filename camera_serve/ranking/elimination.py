"""What each micro-expert is worth when the others of its expert make up for it as well as they can.

Micro-experts of one expert do much of the same work. So they are taken out one after another, each
time the one whose loss the rest can best repair, as in the optimal brain surgeon (Hassibi and
Stork, 1993) on a sum of micro-experts: with G = Σ φφᵀ over the calibration tokens and w_j the down
vector of micro-expert j, taking out j costs ‖w_j‖² / (H⁻¹)_jj, where H is G with a ridge, and W and
H are those of what is left.
"""

from typing import NamedTuple

import torch

RIDGE = 1e-3
"""Added to the Gram matrix's diagonal, as a share of its mean."""

AT_ONCE = 32
"""An expert is taken apart in this many steps; one micro-expert a step is hardly better."""

STEPS_AT_ONCE = 4
"""After so many steps the matrices are made smaller: that costs as much as a step."""


class Elimination(NamedTuple):
    """The order in which micro-experts of some experts are taken out, and what that costs.

    order: int64 `[num_experts, d_ff]`, indices, the first to go first; costs: float64 of the same
    shape and order, never falling: the error that the removal adds, in units of ‖Σ φ_j w_j‖².
    """

    order: torch.Tensor
    costs: torch.Tensor


def eliminate(gram: torch.Tensor, down: torch.Tensor) -> Elimination:
    """Take all micro-experts out of some experts of one width.

    gram: `[num_experts, d_ff, d_ff]`, Σ φφᵀ of each expert; down: `[num_experts, d_ff, d_model]`.
    An expert that saw no token costs nothing, and goes by falling weight from the end. One whose
    Gram matrix is not finite, or is none, costs NaN.
    """
    each = [_eliminate(own, vectors) for own, vectors in zip(gram, down, strict=True)]
    order, costs = zip(*each, strict=True)
    return Elimination(torch.stack(order), torch.stack(costs))


def shrunk(gram: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Σ φφᵀ of one expert `[d_ff, d_ff]` as so few tokens bear it out; changed in place.

    On few tokens any micro-expert looks like a mixture of d_ff others. So what the tokens say of
    pairs is shrunk by n / (n + d_ff) (as in Ledoit and Wolf, 2004), and an expert that saw few
    against its width is taken apart nearly by energy.
    """
    own = gram.diagonal().clone()
    gram *= num_tokens / (num_tokens + len(gram))
    gram.diagonal().copy_(own)
    return gram


def _eliminate(gram: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and costs of one expert.

    Each φ is scaled to Σφ² = 1, and w the other way: no micro-expert is then too large or too small
    beside another for float32.
    """
    squares, down = gram.diagonal().double(), down.to(gram)
    # Nothing seen: any ridge gives the order of the norms.
    seen = squares.mean() > 0
    squares = squares + torch.where(seen, RIDGE * squares.mean(), 1.0)
    sizes = squares.sqrt().to(gram)
    whole = gram / sizes / sizes[:, None]
    whole.diagonal().fill_(1)
    factor, failed = torch.linalg.cholesky_ex(whole)
    if int(failed) or not (squares.isfinite().all() and factor.isfinite().all()):
        return torch.arange(len(gram), device=gram.device), torch.full_like(squares, torch.nan)
    inverse = torch.cholesky_inverse(factor)
    products = (down @ down.T) * sizes * sizes[:, None]
    left = torch.arange(len(gram), device=gram.device)
    order, costs = [], []
    while len(left):
        there = torch.ones_like(left, dtype=torch.bool)
        for _ in range(STEPS_AT_ONCE):
            ratio = products.diagonal() / inverse.diagonal()
            cheapest = ratio.masked_fill(~there, torch.inf).sort(stable=True)
            gone = cheapest.indices[: min(-(-len(gram) // AT_ONCE), len(left))]
            gone = gone[there[gone]]
            order.append(left[gone])
            costs.append(ratio[gone])
            there[gone] = False
            _take_out(products, inverse, gone)
        stay = there.nonzero().squeeze(1)
        products, inverse = (matrix[stay][:, stay] for matrix in (products, inverse))
        left = left[stay]
    rising = torch.cat(costs).double().clamp(min=0).cummax(dim=0).values
    return torch.cat(order), rising * seen


def _take_out(products: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Let the others take over the work of `gone`, whose rows and columns become 0.

    products, inverse: WWᵀ and H⁻¹, `[n, n]`, changed in place; gone: int64 `[k]`.
    """
    rest = inverse[gone]
    taken = torch.linalg.solve(rest[:, gone], rest)
    inverse.addmm_(rest.T, taken, alpha=-1)
    # With half of what is between the gone on either side, one product takes all three terms.
    across = products[gone]
    across = across - across[:, gone] @ taken / 2
    products.addmm_(torch.cat([taken, across]).T, torch.cat([across, taken]), alpha=-1)
