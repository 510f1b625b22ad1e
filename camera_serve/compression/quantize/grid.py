"""The grid of a group of weights: a scale and a real-valued zero, `weight ≈ code · scale + zero`.

A real zero, because with an integer one of the two levels of a 1-bit group is exactly 0.
"""

from dataclasses import dataclass

import torch

SHRINKS = 12
"""Candidates for the clipped range, from the whole of it down to `SMALLEST_RANGE`."""

SMALLEST_RANGE = 0.4
REFINEMENTS = 3
"""Least-squares fits of scale and zero to the codes, each followed by new codes."""

CACHED_WEIGHTS = 2**17
"""Weights fitted at once: every candidate reads them again, from a cache if they fit."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16: a group of equal weights has no range, and no scale may be 0."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero of groups, float32 values that float16 holds exactly.

    scale, zero: `[..., num_groups]`; levels: `[..., 1]` or broadcastable, the highest code.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    levels: torch.Tensor

    def encode(self, weights: torch.Tensor) -> torch.Tensor:
        """Codes nearest to `weights` `[..., num_groups, group]`, as float."""
        scaled = (weights - self.zero[..., None]).div_(self.scale[..., None])
        codes = scaled.round_().clamp_(min=0)
        return torch.minimum(codes, self.levels[..., None])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights that codes `[..., num_groups, group]` stand for."""
        return codes * self.scale[..., None] + self.zero[..., None]


def fit_grid(weights: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> Grid:
    """The grid with the least weighted squared error: clipped ranges, then least squares.

    weights: float32 `[..., num_groups, group]`; levels: `[..., num_groups]` or broadcastable,
    `2**bits - 1`; importance: weight of each squared error, broadcastable to `weights`.
    """
    levels, importance = levels.expand(weights.shape[:-1]), importance.expand_as(weights)
    step = max(1, CACHED_WEIGHTS // max(1, weights[:1].numel()))
    parts = zip(*(t.split(step) for t in (weights, levels, importance)), strict=True)
    grids = [_fit(part.contiguous(), *rest) for part, *rest in parts]
    scale, zero = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scale", "zero"))
    return Grid(scale, zero, levels)


def _fit(weights: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> Grid:
    low, high = weights.amin(-1), weights.amax(-1)
    roots = importance.sqrt()
    best = _grid(low, (high - low) / levels, levels)
    error = _error(best, weights, roots)
    middle, half = (low + high) / 2, (high - low) / 2
    for share in torch.linspace(1, SMALLEST_RANGE, SHRINKS).tolist()[1:]:
        shrunk = _grid(middle - share * half, 2 * share * half / levels, levels)
        best, error = _better(shrunk, best, error, weights, roots)
    mass = importance.sum(-1)
    mean = (weights * importance).sum(-1) / mass
    for _ in range(REFINEMENTS):
        refit = least_squares(best, best.encode(weights), weights, importance, mass, mean)
        best, error = _better(refit, best, error, weights, roots)
    return best


def _grid(zero: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> Grid:
    scale = scale.half().float().clamp(min=SMALLEST_SCALE)
    return Grid(scale, zero.half().float(), levels)


def _error(grid: Grid, weights: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Root of the weighted squared error, up to float32 rounding.

    In units of the scale and in place, because a fit spends its time on reading and writing.
    """
    inverse = grid.scale.reciprocal()
    offset = -grid.zero * inverse
    scaled = (weights * inverse[..., None]).add_(offset[..., None])
    codes = torch.round(scaled).clamp_(min=0)
    torch.minimum(codes, grid.levels[..., None], out=codes)
    return scaled.sub_(codes).mul_(roots).norm(dim=-1) * grid.scale


def _better(
    candidate: Grid,
    best: Grid,
    error: torch.Tensor,
    weights: torch.Tensor,
    roots: torch.Tensor,
) -> tuple[Grid, torch.Tensor]:
    """The better of two grids, group by group."""
    challenge = _error(candidate, weights, roots)
    wins = challenge < error
    scale = torch.where(wins, candidate.scale, best.scale)
    zero = torch.where(wins, candidate.zero, best.zero)
    return Grid(scale, zero, best.levels), torch.minimum(challenge, error)


def least_squares(
    grid: Grid,
    codes: torch.Tensor,
    weights: torch.Tensor,
    importance: torch.Tensor,
    mass: torch.Tensor,
    mean: torch.Tensor,
) -> Grid:
    """Scale and zero that fit `codes` best, where the codes determine both.

    grid: whose scale stays where they do not; codes, weights: float32 `[..., num_groups, group]`;
    mass: the sum of a group's importance; mean: its weights' weighted mean.
    """
    code_mean = (codes * importance).sum(-1) / mass
    spread = codes - code_mean[..., None]
    weighted = spread * importance
    variance = (weighted * spread).sum(-1)
    slope = weighted.mul_(weights).sum(-1) / variance.clamp(min=1e-30)
    scale = torch.where((variance > 1e-30) & (slope > 0), slope, grid.scale)
    return _grid(mean - scale * code_mean, scale, grid.levels)
