"""After GPTQ, codes, scales and zeros are decided again, with all others in place.

GPTQ decides a column before those after it are known, and its grid before its codes. Here each step
takes the least of tr((W - Ŵ) H (W - Ŵ)ᵀ) along one code, or along a scale and its zero, so that no
step raises it: coordinate descent, in blocks as GPTQ's loop is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from camera_serve.compression.quantize.gptq import BLOCK, DAMPING, INNER_BLOCK, Solution, blocks
from camera_serve.compression.quantize.grid import SMALLEST_SCALE, Grid, least_squares

RIDGE = 1e-4
"""Pull of a scale and a zero towards what they were, as a share of their fit's mean diagonal."""

SWEEPS = 3
"""Sweeps over an expert's columns: the first wins about half of what three do, for 1.05 times the
time of a whole compression."""


def damped(hessians: torch.Tensor, failed: torch.Tensor) -> torch.Tensor:
    """What is minimised: GPTQ's Hessians, damped where columns saw input, zeros where it `failed`.

    hessians: float32 `[batch, columns, columns]`; failed: bool `[batch]`. A column whose diagonal
    is 0 keeps it, so that it neither counts nor changes.
    """
    result = hessians.masked_fill(failed[:, None, None], 0)
    diagonal = result.diagonal(dim1=1, dim2=2)
    live = diagonal > 0
    mean = diagonal.sum(1) / live.sum(1).clamp(min=1)
    diagonal += live * (DAMPING * mean)[:, None]
    return result


def polish_along_columns(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    levels: torch.Tensor,
    solution: Solution,
    group_size: int,
    sweeps: int = 1,
) -> Solution:
    """The solution of `solve_along_columns`, with no row's error larger.

    weights, hessians, levels, group_size: what was solved; the error of a row w is
    (w - ŵ) H (w - ŵ)ᵀ, H being `damped`. A sweep takes group after group: its scale and zero, then
    its codes. Matrices whose Hessian failed stay as they are, and so do the codes of dead columns.
    """
    hessians = damped(hessians, solution.failed)
    scale, zero = solution.scale.clone(), solution.zero.clone()
    codes, values = _transposed(solution.codes), _transposed(solution.dequantized)

    def requantize(block: _Block, column: int) -> torch.Tensor:
        group = column // group_size
        grid = Grid(scale[..., group], zero[..., group], levels)
        if column % group_size == 0:
            span = slice(column, column + group_size)
            grid = _refitted(grid, block, span, codes[:, span].float())
            scale[..., group], zero[..., group] = grid.scale, grid.zero
        code = grid.encode(block.target(column)[..., None])
        codes[:, column] = code[..., 0].to(torch.uint8)
        return grid.decode(code)[..., 0]

    for _ in range(sweeps):
        _sweep(weights, hessians, values, requantize, group_size)
    return Solution(codes.transpose(1, 2), values.transpose(1, 2), scale, zero, solution.failed)


def polish_along_rows(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    levels: torch.Tensor,
    solution: Solution,
    group_size: int,
    sweeps: int = 1,
) -> Solution:
    """The solution of `solve_along_rows`, with no matrix's error larger.

    weights, hessians, levels, group_size: what was solved; the error is tr((W - Ŵ) H (W - Ŵ)ᵀ), H
    being `damped`. A sweep takes column after column: new codes, and a scale and zero fitted to
    them where they come closer. Matrices whose Hessian failed, and dead columns, stay as they are.
    """
    hessians = damped(hessians, solution.failed)
    scale, zero = solution.scale.clone(), solution.zero.clone()
    codes, values = _transposed(solution.codes), _transposed(solution.dequantized)
    equal = weights.new_ones(1)
    mass = group_size * equal

    def requantize(block: _Block, column: int) -> torch.Tensor:
        target = block.target(column).unflatten(1, (-1, group_size))
        old = Grid(scale[:, column], zero[:, column], levels[:, column, None])
        code = old.encode(target)
        new = least_squares(old, code, target, equal, mass, target.mean(-1))
        stay, move = old.decode(code), new.decode(code)
        closer = (move - target).square_().sum(-1) < (stay - target).square_().sum(-1)
        closer &= block.inverse[:, column - block.start] > 0
        scale[:, column] = torch.where(closer, new.scale, old.scale)
        zero[:, column] = torch.where(closer, new.zero, old.zero)
        codes[:, column] = code.flatten(1).to(torch.uint8)
        return torch.where(closer[..., None], move, stay).flatten(1)

    for _ in range(sweeps):
        _sweep(weights, hessians, values, requantize, BLOCK)
    return Solution(codes.transpose(1, 2), values.transpose(1, 2), scale, zero, solution.failed)


def _transposed(matrices: torch.Tensor) -> torch.Tensor:
    """A copy, `[batch, columns, rows]`, in which a column is contiguous."""
    return matrices.transpose(1, 2).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Block:
    """The columns from `start` on that are worked on, in place.

    hessian: `[batch, columns, columns]`, damped, among them; inverse: `[batch, columns, 1]`, one
    over its diagonal, 0 for a column that is to stay; values: `[batch, columns, rows]`, the
    dequantized weights ŵ; residual: of that shape, H (w - ŵ) over all columns of the matrix.
    """

    start: int
    hessian: torch.Tensor
    inverse: torch.Tensor
    values: torch.Tensor
    residual: torch.Tensor

    def target(self, column: int) -> torch.Tensor:
        """The best real weights of a column, all others being as they are, `[batch, rows]`."""
        own = column - self.start
        return torch.addcmul(self.values[:, own], self.residual[:, own], self.inverse[:, own])

    def spread(self, moved: torch.Tensor, first: int, later: slice) -> None:
        """Let the columns `later` of the block know what those from its `first` on have lost."""
        share = self.hessian[:, later, first : first + moved.shape[1]]
        self.residual[:, later].baddbmm_(share, moved)


def _refitted(grid: Grid, block: _Block, span: slice, codes: torch.Tensor) -> Grid:
    """The grid of a group with the least error, or `grid` where rounding to float16 takes the gain.

    grid: `[batch, rows]`; codes: `[batch, group, rows]`, those of the columns `span`, whose values
    and residual are brought up to date.
    """
    own = slice(span.start - block.start, span.stop - block.start)
    hessian, residual = block.hessian[:, own, own], block.residual[:, own]
    by_scale, by_zero = hessian @ codes, hessian.sum(2, keepdim=True)
    # The normal equations of both changes: their matrix, and what they are to make up for.
    aa, ab, bb = (codes * by_scale).sum(1), by_scale.sum(1), by_zero.sum(1)
    a, b = (codes * residual).sum(1), residual.sum(1)
    ridge = RIDGE * (aa + bb) / 2
    determinant = (aa + ridge) * (bb + ridge) - ab.square()
    scale = grid.scale + ((bb + ridge) * a - ab * b) / determinant
    zero = grid.zero + ((aa + ridge) * b - ab * a) / determinant
    scale, zero = scale.half().float().clamp_(min=SMALLEST_SCALE), zero.half().float()
    steps = (scale - grid.scale, zero - grid.zero)
    gain = steps[0] * (2 * a - steps[0] * aa - 2 * steps[1] * ab)
    gain += steps[1] * (2 * b - steps[1] * bb)
    # Infinite where float16 ends, NaN where no column of the group saw input.
    keep = (gain > 0) & gain.isfinite()
    by_row = [step.where(keep, 0)[:, None] for step in steps]
    block.values[:, own].addcmul_(codes, by_row[0]).add_(by_row[1])
    residual.addcmul_(by_scale, by_row[0], value=-1).addcmul_(by_zero, by_row[1], value=-1)
    return Grid(scale.where(keep, grid.scale), zero.where(keep, grid.zero), grid.levels)


Requantize = Callable[[_Block, int], torch.Tensor]
"""`(block, column) -> values`, `[batch, rows]`: the new ones of a column, which it does not set.

At the first column of a group it may change the values of all of the group, with their residual.
"""


def _sweep(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    values: torch.Tensor,
    requantize: Requantize,
    group: int,
) -> None:
    """Requantize every column of `values` once, in place.

    weights: `[batch, rows, columns]`; values: `[batch, columns, rows]`; group: columns of one.
    """
    weights = weights.transpose(1, 2)
    lost = torch.sub(weights, values, out=torch.empty_like(values))
    diagonal = hessians.diagonal(dim1=1, dim2=2)[..., None]
    inverse = diagonal.reciprocal().masked_fill_(diagonal <= 0, 0)
    for start, end in blocks(0, values.shape[1], max(group, BLOCK // group * group)):
        own = slice(start, end)
        # Only now, when all columns before have moved: one product does for them and those after.
        residual = hessians[:, own] @ lost
        block = _Block(start, hessians[:, own, own], inverse[:, own], values[:, own], residual)
        _sweep_block(block, requantize, group)
        torch.sub(weights[:, own], values[:, own], out=lost[:, own])


def _sweep_block(block: _Block, requantize: Requantize, group: int) -> None:
    values, num_columns = block.values, block.values.shape[1]
    for start, end in blocks(0, num_columns, group):
        before = values[:, start:end].clone()
        for first, last in blocks(start, end, INNER_BLOCK):
            moved = torch.empty_like(values[:, first:last])
            for column in range(first, last):
                new, old = requantize(block, block.start + column), values[:, column]
                move = torch.sub(old, new, out=moved[:, column - first])
                old.copy_(new)
                share = block.hessian[:, column, column + 1 : last, None]
                block.residual[:, column + 1 : last].addcmul_(share, move[:, None])
            block.spread(moved, first, slice(last, end))
        block.spread(before.sub_(values[:, start:end]), start, slice(end, num_columns))
