import pytest
import torch

from camera_serve.compression.quantize.grid import Grid, fit_grid


def error(grid: Grid, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    return ((grid.decode(grid.encode(weights)) - weights) ** 2 * importance).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_weights_that_lie_on_a_grid_are_kept(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 3, 64)).float()
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    weights = codes * 0.25 - 0.5
    grid = fit_grid(weights, torch.tensor(2.0**bits - 1), torch.ones(1))
    assert grid.decode(grid.encode(weights)).equal(weights)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_fit_is_never_worse_than_minimum_and_maximum(bits: int) -> None:
    weights, importance = torch.randn(50, 2, 128), torch.rand(50, 2, 128)
    levels = torch.tensor(2.0**bits - 1)
    low, high = weights.amin(-1).half().float(), weights.amax(-1)
    plain = Grid(((high - weights.amin(-1)) / levels).half().float(), low, levels)
    fitted = fit_grid(weights, levels, importance)
    assert (error(fitted, weights, importance) <= error(plain, weights, importance)).all()
    assert error(fitted, weights, importance).sum() < 0.8 * error(plain, weights, importance).sum()


def test_one_bit_finds_the_two_means() -> None:
    weights = torch.tensor([[[-3.0, -2.0, -1.0, 4.0, 5.0, 6.0, -2.0, 5.0]]])
    grid = fit_grid(weights, torch.tensor(1.0), torch.ones(1))
    assert grid.decode(grid.encode(weights))[0, 0].unique().tolist() == [-2.0, 5.0]


def test_importance_moves_the_levels() -> None:
    weights = torch.tensor([[[0.0, 1.0, 2.0, 10.0]]])
    heavy = torch.tensor([1e4, 1.0, 1.0, 1e4])
    grid = fit_grid(weights, torch.tensor(1.0), heavy)
    decoded = grid.decode(grid.encode(weights))[0, 0]
    torch.testing.assert_close(decoded[[0, 3]], torch.tensor([0.0, 10.0]), rtol=0, atol=0.01)


def test_a_constant_group_has_a_positive_scale_and_is_exact() -> None:
    weights = torch.full((1, 2, 32), 0.75)
    weights[0, 1] = 0
    grid = fit_grid(weights, torch.tensor(3.0), torch.ones(1))
    assert (grid.scale > 0).all()
    assert grid.decode(grid.encode(weights)).equal(weights)


def test_scales_and_zeros_are_float16_values() -> None:
    grid = fit_grid(torch.randn(9, 4, 128), torch.tensor(3.0), torch.ones(1))
    assert grid.scale.half().float().equal(grid.scale)
    assert grid.zero.half().float().equal(grid.zero)
