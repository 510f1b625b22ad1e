"""The solver against AutoGPTQ's own, loaded alone from its published package, and from theory."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from camera_serve.compression.quantize.gptq import (
    feedback_of,
    solve_along_columns,
    solve_along_rows,
)
from camera_serve.compression.quantize.grid import Grid, fit_grid

ORACLE = Path(sys.prefix) / "oracle" / "auto_gptq" / "quantization"


@pytest.fixture(scope="module")
def auto_gptq() -> Any:
    """`auto_gptq.quantization.gptq.GPTQ`: the package itself no longer imports."""
    assert (ORACLE / "gptq.py").exists(), "run .ci/setup: it fetches auto-gptq 0.7.1, the oracle"
    package = types.ModuleType("auto_gptq_solver")
    package.__path__ = [str(ORACLE)]
    sys.modules["auto_gptq_solver"] = package
    return importlib.import_module("auto_gptq_solver.gptq").GPTQ


def integer_zero(weights: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> Grid:
    """AutoGPTQ's asymmetric grid: minimum to maximum, 0 included, an integer zero."""
    low, high = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
    scale = (high - low) / levels
    return Grid(scale, -scale * torch.round(-low / scale), levels)


def problem(kind: str, batch: int = 3, rows: int = 48, columns: int = 256) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = 100 if kind == "rank-deficient" else 600
    x = torch.randn(batch, tokens, columns, generator=generator)
    if kind == "ill-conditioned":
        x = x * torch.logspace(0, -4, columns)
    if kind == "dead columns":
        x[..., ::7] = 0
    weights = torch.randn(batch, rows, columns, generator=generator) * 0.05
    return weights, x.transpose(1, 2) @ x


KINDS = ["well-conditioned", "ill-conditioned", "rank-deficient", "dead columns"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_reproduces_auto_gptq(
    auto_gptq: Any, monkeypatch: pytest.MonkeyPatch, kind: str, bits: int
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    weights, hessians = problem(kind)
    wanted = []
    for matrix, hessian in zip(weights, hessians, strict=True):
        linear = torch.nn.Linear(*reversed(matrix.shape), bias=False)
        linear.weight.data = matrix.clone()
        oracle = auto_gptq(linear)
        oracle.quantizer.configure(bits, perchannel=True, sym=False)
        oracle.H, oracle.nsamples = hessian.clone(), 1
        oracle.fasterquant(group_size=128)
        wanted.append(linear.weight.data)
    levels = torch.full(weights.shape[:2], 2.0**bits - 1)
    ours = solve_along_columns(weights, hessians, levels, 128, integer_zero).dequantized
    # Equal but for the order of float32 sums; a weight at a rounding border may take the other
    # code, and moves its later neighbours in its row: one row in 144 is let off.
    differs = (ours - torch.stack(wanted)).abs() > 1e-5
    assert differs.any(-1).sum() <= 1


def loss(weights: torch.Tensor, ours: torch.Tensor, hessians: torch.Tensor) -> float:
    delta = ours - weights
    return torch.einsum("brc,bcd,brd->", delta, hessians, delta).item()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_fitted_grid_beats_the_integer_one(bits: int) -> None:
    weights, hessians = problem("well-conditioned")
    levels = torch.full(weights.shape[:2], 2.0**bits - 1)
    losses = [
        loss(weights, solve_along_columns(weights, hessians, levels, 128, f).dequantized, hessians)
        for f in (fit_grid, integer_zero)
    ]
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("solve", [solve_along_columns, solve_along_rows])
def test_compensation_beats_rounding_to_nearest(solve: Any) -> None:
    # Correlated inputs: 100 tokens span less than half of the 256 columns.
    weights, hessians = problem("rank-deficient", rows=256)
    levels = torch.full(weights.shape[:2], 3.0)
    rounded = torch.eye(256).expand(3, 256, 256)
    losses = [
        loss(weights, solve(weights, h, levels, 128).dequantized, hessians)
        for h in (hessians, rounded)
    ]
    assert losses[0] < 0.7 * losses[1]


def test_an_identity_hessian_rounds_every_weight_to_its_nearest_level() -> None:
    weights = torch.randn(2, 8, 128)
    levels = torch.full((2, 8), 7.0)
    solved = solve_along_columns(weights, torch.eye(128).expand(2, 128, 128), levels, 64)
    grid = Grid(solved.scale, solved.zero, levels[..., None])
    nearest = grid.decode(grid.encode(weights.unflatten(-1, (2, 64)))).flatten(-2)
    assert solved.dequantized.equal(nearest)


def test_codes_scales_and_zeros_give_the_dequantized_weights() -> None:
    weights, hessians = problem("well-conditioned", rows=256)
    levels = torch.full(weights.shape[:2], 3.0)
    along_columns = solve_along_columns(weights, hessians, levels, 128)
    grid = Grid(along_columns.scale, along_columns.zero, levels)
    decoded = grid.decode(along_columns.codes.float().unflatten(-1, (2, 128))).flatten(-2)
    assert decoded.equal(along_columns.dequantized)
    along_rows = solve_along_rows(weights, hessians, levels, 128)
    grid = Grid(along_rows.scale, along_rows.zero, levels)
    codes = along_rows.codes.transpose(1, 2).float().unflatten(-1, (2, 128))
    assert grid.decode(codes).flatten(-2).transpose(1, 2).equal(along_rows.dequantized)


def test_rows_of_different_bits_do_not_touch_each_other() -> None:
    weights, hessians = problem("well-conditioned", batch=1, rows=6)
    mixed = torch.tensor([[7.0, 7.0, 3.0, 3.0, 1.0, 1.0]])
    together = solve_along_columns(weights, hessians, mixed, 128)
    for span, level in ((slice(0, 2), 7.0), (slice(2, 4), 3.0), (slice(4, 6), 1.0)):
        alone = solve_along_columns(weights[:, span], hessians, torch.full((1, 2), level), 128)
        assert together.codes[:, span].equal(alone.codes)


def test_a_batch_gives_what_each_matrix_gives_alone() -> None:
    weights, hessians = problem("well-conditioned")
    levels = torch.full(weights.shape[:2], 3.0)
    together = solve_along_columns(weights, hessians, levels, 128)
    for index in range(3):
        one = slice(index, index + 1)
        alone = solve_along_columns(weights[one], hessians[one], levels[one], 128)
        assert (together.codes[one] != alone.codes).float().mean() < 1e-3


@pytest.mark.parametrize("solve", [solve_along_columns, solve_along_rows])
def test_what_dead_columns_weigh_does_not_matter(solve: Any) -> None:
    weights, hessians = problem("dead columns", rows=128)
    dead = feedback_of(hessians).dead
    assert dead[:, ::7].all() and dead.sum() == 3 * len(range(0, 256, 7))
    levels = torch.full((3, 256 if solve is solve_along_rows else 128), 3.0)
    huge = weights.masked_fill(dead[:, None], 1e3)
    ours = [solve(w, hessians, levels, 128) for w in (weights, huge)]
    assert ours[0].codes.equal(ours[1].codes) and ours[0].scale.equal(ours[1].scale)
    assert ours[0].dequantized.isfinite().all()


def test_dead_columns_have_no_weight_in_a_grid_s_fit() -> None:
    weights, hessians = problem("dead columns")
    weighed: list[torch.Tensor] = []

    def fit(values: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> Grid:
        weighed.append(importance.flatten(1))
        return fit_grid(values, levels, importance)

    levels = torch.full(weights.shape[:2], 3.0)
    solve_along_columns(weights, hessians, levels, 128, fit)
    assert (torch.cat(weighed, dim=1) == 0).equal(feedback_of(hessians).dead)


@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 384])
def test_a_grid_is_fitted_to_what_best_makes_up_for_the_columns_before(group: int) -> None:
    weights, hessians = problem("ill-conditioned", rows=4, columns=384)
    fitted: list[torch.Tensor] = []

    def fit(values: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> Grid:
        fitted.append(values.flatten(2))
        return fit_grid(values, levels, importance)

    levels = torch.full(weights.shape[:2], 3.0)
    solved = solve_along_columns(weights, hessians, levels, group, fit).dequantized.double()
    damped = hessians.double()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += 0.01 * diagonal.mean(1, keepdim=True)
    for start, found in zip(range(group, 384, group), fitted[1:], strict=True):
        lost = weights[..., :start].double() - solved[..., :start]
        # Least squares over all columns still free, of which the group is the first.
        inverse = torch.linalg.inv(damped[:, start:, start:])
        best = weights[..., start:] + lost @ damped[:, :start, start:] @ inverse
        wanted = best[..., :group]
        # Float32 sums over a Hessian of condition 1e2 after damping.
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_an_indefinite_hessian_is_damped_until_it_can_be_solved() -> None:
    good = torch.eye(64) + 0.1 * torch.ones(64, 64)
    bad = torch.eye(64)
    bad[0, 1] = bad[1, 0] = 3.0
    hopeless = torch.eye(64)
    hopeless[0, 1] = hopeless[1, 0] = 1e4
    feedback = feedback_of(torch.stack([good, bad, hopeless]))
    factor = feedback.factor
    assert feedback.failed.tolist() == [False, False, True]
    assert factor.isfinite().all()
    assert factor[0].equal(feedback_of(good[None]).factor[0])
    assert factor[2].equal(torch.eye(64))
    assert not factor[1].equal(torch.eye(64))
