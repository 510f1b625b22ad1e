"""Polish against its formulas, one row at a time in float64, and what it must never do."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera_serve.compression.quantize.gptq import Solution, solve_along_columns, solve_along_rows
from camera_serve.compression.quantize.grid import SMALLEST_SCALE, Grid
from camera_serve.compression.quantize.polish import (
    RIDGE,
    damped,
    polish_along_columns,
    polish_along_rows,
)

Solve = Callable[..., Solution]

WAYS = [(solve_along_columns, polish_along_columns), (solve_along_rows, polish_along_rows)]
BOTH = pytest.mark.parametrize(("solve", "polish"), WAYS, ids=["columns", "rows"])
LEVELS = [1.0, 3.0, 7.0, 15.0, 255.0]


def problem(
    shape: tuple[int, int, int], tokens: int = 300, seed: int = 0, dead: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and Hessians of correlated inputs, every `dead`-th of which is 0."""
    batch, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(batch, columns, columns, generator=generator) * torch.logspace(
        0, -2, columns
    )
    x = torch.randn(batch, tokens, columns, generator=generator) @ mixed.transpose(1, 2)
    if dead:
        x[..., ::dead] = 0
    return torch.randn(batch, rows, columns, generator=generator), x.transpose(1, 2) @ x


def errors(weights: torch.Tensor, hessians: torch.Tensor, solution: Solution) -> torch.Tensor:
    """(w - ŵ) H (w - ŵ)ᵀ of every row, float64 `[batch, rows]`."""
    off = (weights - solution.dequantized).double()
    return ((off @ damped(hessians, solution.failed).double()) * off).sum(-1)


def levels_of(solve: Solve, weights: torch.Tensor, level: float | None = None) -> torch.Tensor:
    """Highest codes of each row (columns, where groups lie along rows): mixed, or all alike."""
    count = weights.shape[1 if solve is solve_along_columns else 2]
    mixed = torch.tensor(LEVELS)[torch.arange(count) % len(LEVELS)]
    return (mixed if level is None else torch.full_like(mixed, level)).repeat(len(weights), 1)


def decoded(solve: Solve, solution: Solution, levels: torch.Tensor) -> torch.Tensor:
    """What codes, scales and zeros stand for."""
    codes = solution.codes.float()
    if solve is solve_along_rows:
        codes = codes.transpose(1, 2)
    grid = Grid(solution.scale, solution.zero, levels)
    values = grid.decode(codes.unflatten(-1, (solution.scale.shape[-1], -1))).flatten(-2)
    return values.transpose(1, 2) if solve is solve_along_rows else values


@BOTH
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 32, 48, 128]),
    other=st.integers(1, 40),
    tokens=st.sampled_from([5, 40, 400]),
    dead=st.sampled_from([0, 3]),
    sweeps=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_no_error_rises_and_what_is_stored_is_what_was_judged(
    solve: Solve,
    polish: Solve,
    batch: int,
    groups: int,
    size: int,
    other: int,
    tokens: int,
    dead: int,
    sweeps: int,
    seed: int,
) -> None:
    grouped = groups * size
    shape = (batch, other, grouped) if solve is solve_along_columns else (batch, grouped, other)
    weights, hessians = problem(shape, tokens, seed, dead)
    levels = levels_of(solve, weights)
    solved = solve(weights, hessians, levels, size)
    polished = polish(weights, hessians, levels, solved, size, sweeps=sweeps)
    # Each row of gate and up on its own; of down the matrix, whose groups run across the rows.
    before, after = (errors(weights, hessians, s) for s in (solved, polished))
    if solve is solve_along_rows:
        before, after = before.sum(-1), after.sum(-1)
    size_of_all = errors(weights, hessians, solved).max()
    assert (after <= before + 1e-6 * (before + size_of_all)).all()
    assert polished.dequantized.allclose(decoded(solve, polished, levels), rtol=1e-5, atol=1e-5)
    allowed = levels[..., None] if solve is solve_along_columns else levels[:, None]
    assert (polished.codes <= allowed).all()
    for stored in (polished.scale, polished.zero):
        assert stored.half().float().equal(stored)
    assert (polished.scale > 0).all()


def row_by_definition(
    w: torch.Tensor, h: torch.Tensor, level: float, codes: torch.Tensor, grids: torch.Tensor
) -> torch.Tensor:
    """A sweep over a row, float64: per group scale and zero by least squares, then every code."""
    size = len(w) // len(grids)
    expand = [g.repeat_interleave(size) for g in grids.T]
    q = codes * expand[0] + expand[1]
    for group in range(len(grids)):
        own = slice(group * size, (group + 1) * size)
        basis = torch.zeros(len(w), 2, dtype=torch.float64)
        basis[own, 0], basis[own, 1] = codes[own], 1
        normal = basis.T @ h @ basis
        ridge = RIDGE * normal.diagonal().mean() * torch.eye(2)
        change = torch.linalg.solve(normal + ridge, basis.T @ h @ (w - q))
        grid = (grids[group] + change).half().double()
        grid[0].clamp_(min=SMALLEST_SCALE)
        new = q.clone()
        new[own] = codes[own] * grid[0] + grid[1]
        if (w - new) @ h @ (w - new) < (w - q) @ h @ (w - q):
            q, grids[group] = new, grid
        for j in range(own.start, own.stop):
            target = q[j] + ((w - q) @ h)[j] / h[j, j]
            scale, zero = grids[group]
            codes[j] = ((target - zero) / scale).round().clamp(0, level)
            q[j] = codes[j] * scale + zero
    return q


def test_groups_of_columns_follow_the_formulas() -> None:
    weights, hessians = problem((2, 20, 96))
    levels = levels_of(solve_along_columns, weights)
    solved = solve_along_columns(weights, hessians, levels, 48)
    polished = polish_along_columns(weights, hessians, levels, solved, 48)
    damp = damped(hessians, solved.failed).double()
    differs = 0
    for b in range(2):
        for r in range(20):
            grids = torch.stack([solved.scale[b, r], solved.zero[b, r]], 1).double()
            start = solved.codes[b, r].double()
            wanted = row_by_definition(
                weights[b, r].double(), damp[b], levels[b, r].item(), start, grids
            )
            differs += int((polished.dequantized[b, r] - wanted).abs().max() > 1e-4)
    # A float32 sum at a rounding border takes the other code, and moves its later neighbours.
    assert differs <= 2


def test_groups_of_rows_follow_the_formulas() -> None:
    weights, hessians = problem((1, 96, 40))
    levels = levels_of(solve_along_rows, weights)
    solved = solve_along_rows(weights, hessians, levels, 48)
    polished = polish_along_rows(weights, hessians, levels, solved, 48)
    w, h = weights[0].double(), damped(hessians, solved.failed)[0].double()
    q = solved.dequantized[0].double()
    for j in range(40):
        target = q[:, j] + ((w - q) @ h)[:, j] / h[j, j]
        for group in range(2):
            own = slice(48 * group, 48 * group + 48)
            scale, zero = (t[0, j, group].double() for t in (solved.scale, solved.zero))
            codes = ((target[own] - zero) / scale).round().clamp(0, levels[0, j].item())
            design = torch.stack([codes, torch.ones(48)], 1)
            fitted = torch.linalg.lstsq(design, target[own], driver="gelsd").solution.half()
            moved = design @ fitted.double()
            q[own, j] = codes * scale + zero
            if fitted[0] > 0 and (moved - target[own]).norm() < (q[own, j] - target[own]).norm():
                q[own, j] = moved
    # A float32 sum at a rounding border takes the other code of one weight, and moves later ones.
    assert ((polished.dequantized[0] - q).abs() > 1e-3).double().mean() < 0.03


@BOTH
@pytest.mark.parametrize("level", [1.0, 3.0, 7.0])
def test_it_wins_what_gptq_has_left(solve: Solve, polish: Solve, level: float) -> None:
    weights, hessians = problem((2, 128, 128))
    levels = levels_of(solve, weights, level)
    solved = solve(weights, hessians, levels, 64)
    once, twice = (polish(weights, hessians, levels, solved, 64, sweeps=n) for n in (1, 2))
    totals = [errors(weights, hessians, s).sum() for s in (solved, once, twice)]
    assert totals[2] < totals[1] < 0.97 * totals[0]


@BOTH
def test_a_matrix_whose_hessian_failed_stays_as_it_is(solve: Solve, polish: Solve) -> None:
    weights, hessians = problem((3, 64, 64))
    hessians[1] = torch.eye(64)
    hessians[1, 0, 1] = hessians[1, 1, 0] = 1e4
    levels = levels_of(solve, weights, 3.0)
    solved = solve(weights, hessians, levels, 32)
    polished = polish(weights, hessians, levels, solved, 32)
    assert solved.failed.tolist() == polished.failed.tolist() == [False, True, False]
    for name in ("codes", "dequantized", "scale", "zero"):
        before, after = getattr(solved, name), getattr(polished, name)
        assert before[1].equal(after[1])
        assert not before[0].equal(after[0])


@BOTH
def test_dead_columns_do_not_count(solve: Solve, polish: Solve) -> None:
    weights, hessians = problem((2, 64, 64), dead=5)
    levels = levels_of(solve, weights, 3.0)
    solved = solve(weights, hessians, levels, 32)
    huge = weights.clone()
    huge[..., ::5] = 1e3
    ours = [polish(w, hessians, levels, solved, 32) for w in (weights, huge)]
    assert ours[0].codes.equal(ours[1].codes) and ours[0].scale.equal(ours[1].scale)
    assert ours[0].codes[..., ::5].equal(solved.codes[..., ::5])


@BOTH
def test_padding_changes_nothing(solve: Solve, polish: Solve) -> None:
    weights, hessians = problem((1, 64, 64))
    levels = levels_of(solve, weights, 3.0)
    wide = torch.nn.functional.pad
    if solve is solve_along_columns:
        padded, padded_hessians = wide(weights, (0, 0, 0, 9)), hessians
    else:
        padded, padded_hessians = wide(weights, (0, 9)), wide(hessians, (0, 9, 0, 9))
    many = wide(levels, (0, 9), value=1.0)
    own = solve(weights, hessians, levels, 32)
    widths = ([64],) if solve is solve_along_rows else ()
    with_padding = solve(padded, padded_hessians, many, 32, *widths)
    alone = polish(weights, hessians, levels, own, 32)
    together = polish(padded, padded_hessians, many, with_padding, 32)
    assert (together.codes[:, :64, :64] != alone.codes).float().mean() < 0.01
    # Padding weighs nothing, and goes on weighing nothing.
    rest = (
        (slice(64, None), slice(None))
        if solve is solve_along_columns
        else (slice(None), slice(64, None))
    )
    assert not together.dequantized[0][rest].any()


@BOTH
def test_a_batch_gives_what_each_matrix_gives_alone(solve: Solve, polish: Solve) -> None:
    weights, hessians = problem((3, 96, 96))
    levels = levels_of(solve, weights)
    solved = solve(weights, hessians, levels, 48)
    together = polish(weights, hessians, levels, solved, 48)
    for index in range(3):
        one = slice(index, index + 1)
        own = Solution(
            *(getattr(solved, n)[one] for n in ("codes", "dequantized", "scale", "zero", "failed"))
        )
        alone = polish(weights[one], hessians[one], levels[one], own, 48)
        assert (together.codes[one] != alone.codes).float().mean() < 0.01
