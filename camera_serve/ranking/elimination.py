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


class Elimination(NamedTuple):
    """The order in which micro-experts of some experts are taken out, and what that costs.

    order: int64 `[num_experts, d_ff]`, indices, the first to go first; costs: float64 of the same
    shape and order, never falling: the error that the removal adds, in units of ‖Σ φ_j w_j‖².
    """

    order: torch.Tensor
    costs: torch.Tensor


def eliminate(gram: torch.Tensor, down: torch.Tensor) -> Elimination:
    """Take all micro-experts out of some experts of one width.

    gram: float64 `[num_experts, d_ff, d_ff]`, Σ φφᵀ of each expert; down: `[num_experts, d_ff,
    d_model]`. An expert that saw no token costs nothing, and goes by falling weight from the end.
    """
    num_experts, d_ff, _ = down.shape
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(1)
    # Nothing seen: any ridge gives the order of the norms.
    seen = diagonal > 0
    ridge = torch.where(seen, RIDGE * diagonal, 1.0)
    eye = torch.eye(d_ff, dtype=torch.float64, device=gram.device)
    inverse = torch.linalg.inv(gram + ridge[:, None, None] * eye)
    weights = down.double()
    products = weights @ weights.mT
    left = torch.arange(d_ff, device=gram.device).repeat(num_experts, 1)
    order, costs = [], []
    step = -(-d_ff // AT_ONCE)
    while left.shape[1]:
        each = products.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)
        cheapest = each.sort(dim=1, stable=True)
        gone, stay = cheapest.indices[:, :step], cheapest.indices[:, step:].sort(dim=1).values
        order.append(left.gather(1, gone))
        costs.append(cheapest.values[:, :step])
        products, inverse = _without(products, inverse, gone, stay)
        left = left.gather(1, stay)
    rising = torch.cat(costs, dim=1).clamp(min=0).cummax(dim=1).values
    return Elimination(torch.cat(order, dim=1), rising * seen[:, None])


def _without(
    products: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor, stay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """WWᵀ and H⁻¹ of the micro-experts that stay, which have taken over the work of the others.

    products, inverse: `[num_experts, n, n]`; gone, stay: int64 `[num_experts, k]` and `[n - k]`.
    """
    rest = _block(inverse, gone, stay)
    taken = torch.linalg.solve(_block(inverse, gone, gone), rest)
    across = _block(products, stay, gone) @ taken
    kept = _block(products, stay, stay) - across - across.mT
    kept += taken.mT @ _block(products, gone, gone) @ taken
    return kept, _block(inverse, stay, stay) - rest.mT @ taken


def _block(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`matrix[e][rows[e]][:, columns[e]]` of each expert."""
    wide = matrix.gather(1, rows[:, :, None].expand(-1, -1, matrix.shape[2]))
    return wide.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
