"""GPTQ for many matrices at once: the column loop, its factors, and two ways to group weights.

The loop is that of Frantar et al. (arXiv 2210.17323, Algorithm 1), batched over experts: each step
quantizes one column of every matrix and spreads its error over the columns still to come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from camera_serve.quantize.grid import Grid, fit_grid

BLOCK = 128
"""Columns whose mutual updates are applied at once, before the rest of the matrix is touched."""

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian before it is inverted, as AutoGPTQ does."""

RETRIES = 3

FitGrid = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Grid]


@dataclass(frozen=True)
class Solution:
    """Quantized matrices. codes: uint8, dequantized: float32, both of the weights' shape.

    scale, zero: one entry per group, in the order their solver states.
    """

    codes: torch.Tensor
    dequantized: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


QuantizeColumn = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(column, weights [batch, rows], rest of the block) -> (codes, dequantized)`, both as weights."""


def inverse_factor(
    hessians: torch.Tensor, widths: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor of the damped inverse Hessians, and which columns are dead.

    hessians: float32 `[batch, columns, columns]`, Σ x·xᵀ; widths: columns of each that are no
    padding. A column whose diagonal is 0 saw no input: its diagonal becomes 1 and its weights may
    be set to 0, as in AutoGPTQ. A Hessian that stays indefinite in float32 is damped ten times
    more, and rounded to nearest (identity) if nothing helps.
    """
    hessians = hessians.clone()
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal[dead] = 1
    own = widths or [hessians.shape[1]] * len(hessians)
    mean = torch.stack([d[:width].mean() for d, width in zip(diagonal, own, strict=True)])
    damping = DAMPING * mean
    diagonal += damping[:, None]
    factor, failed = _upper_factor(hessians)
    for _ in range(RETRIES):
        if not failed.any():
            return factor, dead
        # Or two factors would be held at once.
        del factor
        damping = 10 * damping
        diagonal += torch.where(failed, damping, torch.zeros_like(damping))[:, None]
        factor, failed = _upper_factor(hessians)
    identity = torch.eye(hessians.shape[1], device=hessians.device)
    return torch.where(failed[:, None, None], identity, factor), dead


def _upper_factor(hessians: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of each inverse, and which could not be computed."""
    # One name for all three, so that each is given up for the next: they are as large as Hessians.
    factor, first = torch.linalg.cholesky_ex(hessians)
    factor = torch.cholesky_inverse(factor)
    factor, second = torch.linalg.cholesky_ex(factor, upper=True)
    return factor, (first > 0) | (second > 0)


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
    factor, dead = inverse_factor(hessians)
    grids: list[Grid] = []

    def quantize(
        column: int, values: torch.Tensor, group: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if column % group_size == 0:
            span = slice(column, column + group_size)
            importance = factor.diagonal(dim1=1, dim2=2)[:, span].square().reciprocal()
            grids.append(fit(group[:, :, None], levels[..., None], importance[:, None, None]))
        codes = grids[-1].encode(values[..., None, None])
        decoded = grids[-1].decode(codes)
        return codes[..., 0, 0], decoded[..., 0, 0]

    codes, dequantized = _columns(weights, factor, dead, quantize, group_size)
    scale = torch.cat([grid.scale for grid in grids], dim=-1)
    zero = torch.cat([grid.zero for grid in grids], dim=-1)
    return Solution(codes, dequantized, scale, zero)


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
    factor, dead = inverse_factor(hessians, widths)
    grids: list[Grid] = []
    equal = weights.new_ones(1)

    def quantize(
        column: int, values: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = values.unflatten(1, (-1, group_size))
        grids.append(fit_grid(groups, levels[:, column, None], equal))
        codes = grids[-1].encode(groups)
        return codes.flatten(1), grids[-1].decode(codes).flatten(1)

    codes, dequantized = _columns(weights, factor, dead, quantize, BLOCK)
    scale = torch.stack([grid.scale for grid in grids], dim=1)
    zero = torch.stack([grid.zero for grid in grids], dim=1)
    return Solution(codes, dequantized, scale, zero)


def _columns(
    weights: torch.Tensor,
    factor: torch.Tensor,
    dead: torch.Tensor,
    quantize: QuantizeColumn,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column loop: `[batch, rows, columns]` to codes and dequantized weights of that shape.

    Columns lie outermost while it runs, so that every step reads and writes contiguous memory.
    """
    rest = weights.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    rest.masked_fill_(dead.T[..., None], 0)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, len(rest), BLOCK):
        block = rest[start : start + BLOCK]
        local = (
            factor[:, start : start + BLOCK, start : start + BLOCK].permute(1, 2, 0).contiguous()
        )
        errors = torch.empty_like(block)
        for index, values in enumerate(block):
            column = start + index
            group = rest[column : column + group_size].permute(1, 2, 0)
            code, decoded = quantize(column, values, group)
            errors[index] = (values - decoded) / local[index, index][:, None]
            block[index + 1 :].addcmul_(
                local[index, index + 1 :][..., None], errors[index], value=-1
            )
            values.copy_(decoded)
            codes[column] = code.to(torch.uint8)
        later = factor[:, start : start + BLOCK, start + BLOCK :]
        rest[start + BLOCK :] -= torch.einsum("ibr,bij->jbr", errors, later)
    return codes.permute(1, 2, 0), rest.permute(1, 2, 0)
