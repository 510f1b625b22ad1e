"""GPTQ for many matrices at once: the column loop, its factors, and two ways to group weights.

The loop is that of Frantar et al. (arXiv 2210.17323, Algorithm 1), batched over experts: each step
quantizes one column of every matrix and spreads its error over the columns still to come.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from camera_serve.compression.quantize.grid import Grid, fit_grid

BLOCK = 128
INNER_BLOCK = 32
"""Columns whose mutual updates are applied at once, before the rest of the matrix or of the block
is touched."""

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian before it is factored, as AutoGPTQ does."""

RETRIES = 3

FitGrid = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Grid]


@dataclass(frozen=True)
class Solution:
    """Quantized matrices. codes: uint8, dequantized: float32, both of the weights' shape.

    scale, zero: one entry per group, in the order their solver states. failed: bool `[batch]`, the
    Hessian could not be factored, so that every weight was rounded to nearest.
    """

    codes: torch.Tensor
    dequantized: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    failed: torch.Tensor


QuantizeColumn = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(column, weights, group) -> (codes, dequantized)`, both as weights: `[batch, rows]`.

group: `[batch, columns, rows]`, the weights of the columns of a group from this one on.
"""


@dataclass(frozen=True)
class Feedback:
    """How the error of each column is spread over the columns after it.

    factor: float32 `[batch, columns, columns]`, upper with a unit diagonal: column j makes up for
    what column i lost with `factor[i, j]` of it; pivots: `[batch, columns]`, the loss per squared
    error that the columns after it cannot make up for; dead: `[batch, columns]`, saw no input;
    failed: `[batch]`, could not be factored: nothing is spread.
    """

    factor: torch.Tensor
    pivots: torch.Tensor
    dead: torch.Tensor
    failed: torch.Tensor


def feedback_of(hessians: torch.Tensor, widths: Sequence[int] | None = None) -> Feedback:
    """The factors U of damped Hessians U·diag(pivots)·Uᵀ, one Cholesky factorization each.

    GPTQ without an inverse (Chee et al., arXiv 2307.13304, Theorem 6). hessians: float32
    `[batch, columns, columns]`, Σ x·xᵀ; widths: columns of each that are no padding. A column whose
    diagonal is 0 saw no input: its diagonal becomes 1 and its weights may be set to 0, as in
    AutoGPTQ. A Hessian that stays indefinite in float32 is damped ten times more, and rounded to
    nearest (identity) if nothing helps.
    """
    # Factored from the last column back, or the factor would be a lower one.
    backward = hessians.flip(1, 2)
    diagonal = backward.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal[dead] = 1
    own = widths or [hessians.shape[1]] * len(hessians)
    mean = torch.stack([d[-width:].mean() for d, width in zip(diagonal, own, strict=True)])
    damping = DAMPING * mean
    diagonal += damping[:, None]
    factor, failed = torch.linalg.cholesky_ex(backward)
    for _ in range(RETRIES):
        if not failed.any():
            break
        # Or two factors would be held at once.
        del factor
        damping = 10 * damping
        diagonal += torch.where(failed > 0, damping, torch.zeros_like(damping))[:, None]
        factor, failed = torch.linalg.cholesky_ex(backward)
    del backward, diagonal
    factor[failed > 0] = torch.eye(len(factor[0])).to(factor)
    roots = factor.diagonal(dim1=1, dim2=2).clone()
    factor /= roots[:, None]
    pivots = roots.square().masked_fill_(dead, 0)
    return Feedback(factor.flip(1, 2), pivots.flip(1), dead.flip(1), failed > 0)


def solve_along_columns(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    levels: torch.Tensor,
    group_size: int,
    fit: FitGrid = fit_grid,
) -> Solution:
    """GPTQ with groups of consecutive columns of one row: the usual grouping.

    weights: float32 `[batch, rows, columns]`; hessians: `[batch, columns, columns]`; levels:
    `[batch, rows]`, the highest code of each row. scale, zero: `[batch, rows, groups]`.
    """
    feedback = feedback_of(hessians)
    weights = weights.masked_fill(feedback.dead[:, None], 0)
    grids: list[Grid] = []

    def quantize(
        column: int, values: torch.Tensor, group: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if column % group_size == 0:
            span = slice(column, column + group_size)
            best = _made_up(weights[..., span], group.transpose(1, 2), feedback, span)
            importance = feedback.pivots[:, None, None, span]
            grids.append(fit(best[:, :, None], levels[..., None], importance))
        codes = grids[-1].encode(values[..., None, None])
        decoded = grids[-1].decode(codes)
        return codes[..., 0, 0], decoded[..., 0, 0]

    codes, dequantized = _columns(weights, feedback, quantize, group_size)
    scale = torch.cat([grid.scale for grid in grids], dim=-1)
    zero = torch.cat([grid.zero for grid in grids], dim=-1)
    return Solution(codes, dequantized, scale, zero, feedback.failed)


def solve_along_rows(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    levels: torch.Tensor,
    group_size: int,
    widths: Sequence[int] | None = None,
) -> Solution:
    """GPTQ with groups of consecutive rows of one column.

    For down_proj this puts every group inside one micro-expert. weights: float32
    `[batch, rows, columns]`; hessians: `[batch, columns, columns]`; levels: `[batch, columns]`;
    widths: columns of each matrix that are no padding. scale, zero: `[batch, columns, groups]`.
    """
    feedback = feedback_of(hessians, widths)
    weights = weights.masked_fill(feedback.dead[:, None], 0)
    grids: list[Grid] = []
    equal = weights.new_ones(1)

    def quantize(
        column: int, values: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = values.unflatten(1, (-1, group_size))
        grids.append(fit_grid(groups, levels[:, column, None], equal))
        codes = grids[-1].encode(groups)
        return codes.flatten(1), grids[-1].decode(codes).flatten(1)

    codes, dequantized = _columns(weights, feedback, quantize, BLOCK)
    scale = torch.stack([grid.scale for grid in grids], dim=1)
    zero = torch.stack([grid.zero for grid in grids], dim=1)
    return Solution(codes, dequantized, scale, zero, feedback.failed)


def _made_up(
    original: torch.Tensor, fed: torch.Tensor, feedback: Feedback, span: slice
) -> torch.Tensor:
    """The best real weights of the columns `span`, all columns before them being quantized.

    original, fed: `[batch, rows, columns]`, without and with the feedback of the columns before.
    That feedback is meant for a column whose predecessors are all quantized; what the columns of
    `span` would feed each other is still in it.
    """
    between = feedback.factor[:, span, span]
    alone = torch.eye(between.shape[1]).to(between).expand_as(between)
    inverse = torch.linalg.solve_triangular(between, alone, upper=True, unitriangular=True)
    return torch.baddbmm(original, fed - original, inverse)


def _columns(
    weights: torch.Tensor, feedback: Feedback, quantize: QuantizeColumn, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column loop: `[batch, rows, columns]` to codes and dequantized weights of that shape.

    Each matrix is transposed while it runs, so that a column is contiguous.
    """
    original = weights.transpose(1, 2)
    rest = original.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    # Whole groups, or a group's grid would be fitted before all columns before it were made up for.
    whole_groups = math.lcm(INNER_BLOCK, group_size)
    block = max(whole_groups, BLOCK // whole_groups * whole_groups)
    for start, end in blocks(0, rest.shape[1], block):
        # Holds the weights of the block, and as each is quantized, what was lost of it.
        losses = original[:, start:end].clone(memory_format=torch.contiguous_format)
        for first, last in blocks(start, end, INNER_BLOCK):
            for column in range(first, last):
                values = rest[:, column]
                code, decoded = quantize(column, values, rest[:, column : column + group_size])
                loss = losses[:, column - start].sub_(decoded)
                share = feedback.factor[:, column, column + 1 : last, None]
                rest[:, column + 1 : last].addcmul_(share, loss[:, None])
                values.copy_(decoded)
                codes[:, column] = code.to(torch.uint8)
            _spread(losses[:, first - start : last - start], feedback, rest, first, (last, end))
        _spread(losses, feedback, rest, start, (end, rest.shape[1]))
    return codes.transpose(1, 2), rest.transpose(1, 2)


def blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """The spans of `size` from `start` on, the last up to `end`."""
    return ((first, min(first + size, end)) for first in range(start, end, size))


def _spread(
    losses: torch.Tensor, feedback: Feedback, rest: torch.Tensor, first: int, later: tuple[int, int]
) -> None:
    """Let the columns `later` make up for the losses of the columns from `first` on."""
    share = feedback.factor[:, first : first + losses.shape[1], slice(*later)]
    rest[:, slice(*later)].baddbmm_(share.transpose(1, 2), losses)
