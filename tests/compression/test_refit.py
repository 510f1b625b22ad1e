"""Refitted down vectors against ordinary least squares on the tokens themselves."""

import pytest
import torch
from torch.nn import functional

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression import refit
from camera_serve.compression.refit import refit_down, refit_experts
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.elimination import eliminate, shrunk
from camera_serve.ranking.gram import RIDGE, WIDEST

CPU = torch.device("cpu")
D_FF, D_MODEL, TOKENS = 24, 16, 640


def _expert(d_ff: int = 8, d_model: int = 5, tokens: int = 50):
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(tokens, d_ff, generator=generator, dtype=torch.float64)
    phi += phi[:, :1]
    return phi, torch.randn(d_ff, d_model, generator=generator, dtype=torch.float64)


def test_it_is_the_ridge_regression_on_the_tokens() -> None:
    phi, down = _expert()
    kept = torch.tensor([6, 1, 3, 0])
    found, _ = refit_down(phi.T @ phi, phi.T @ phi, down, kept)
    assert found is not None
    # ‖φ_K W - φ down‖² + λ‖W - down_K‖² as ordinary least squares with stacked rows.
    own = phi[:, kept]
    ridge = (RIDGE * own.square().sum(0).mean()).sqrt() * torch.eye(4, dtype=torch.float64)
    wanted = torch.linalg.lstsq(
        torch.cat([own, ridge]), torch.cat([phi @ down, ridge @ down[kept]])
    ).solution
    torch.testing.assert_close(found, wanted)


def test_the_gain_is_by_how_much_the_error_on_other_tokens_falls() -> None:
    (phi, down), kept = _expert(), torch.tensor([6, 1, 3, 0])
    other = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, gain = refit_down(phi.T @ phi, other.T @ other, down, kept)
    assert found is not None
    before, after = (
        (other[:, kept] @ own - other @ down).square().sum() for own in (down[kept], found)
    )
    assert before < after
    assert gain == pytest.approx(float(before - after))


@pytest.mark.parametrize("kept", [[], list(range(8))])
def test_nothing_kept_or_nothing_removed_is_left_alone(kept: list[int]) -> None:
    phi, down = _expert()
    gram = phi.T @ phi
    assert refit_down(gram, gram, down, torch.tensor(kept, dtype=torch.int64)) == (None, 0)


def test_kept_micro_experts_that_never_acted_are_left_alone() -> None:
    phi, down = _expert()
    phi[:, :3] = 0
    assert refit_down(phi.T @ phi, phi.T @ phi, down, torch.tensor([0, 1, 2])) == (None, 0)


def _layer(num_experts: int = 2, tokens: int = TOKENS) -> tuple[RaggedTier, RoutedInputs]:
    generator = torch.Generator().manual_seed(0)
    rows = num_experts * D_FF
    gate, up, down = torch.randn(3, rows, D_MODEL, generator=generator) / 4
    x = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, D_MODEL, generator=generator)
    offsets = tuple(range(0, rows + 1, D_FF))
    seen = tuple(torch.arange(expert, tokens, num_experts) for expert in range(num_experts))
    weights = tuple(torch.rand(len(own), generator=generator) for own in seen)
    return RaggedTier(gate, up, down, offsets), RoutedInputs(x, seen, weights)


def _error(experts: RaggedTier, inputs: RoutedInputs, e: int, kept, down) -> float:
    """‖Σ a (ŷ - y)‖² over the tokens of an expert, with other down vectors for what is kept."""
    rows, x = experts.rows(e), inputs.x[inputs.tokens[e]]
    hidden = functional.silu(x @ experts.gate[rows].T) * (x @ experts.up[rows].T)
    off = hidden[:, kept] @ down - hidden @ experts.down[rows]
    return float((off * inputs.weights[e][:, None]).square().sum())


def test_the_kept_make_up_for_the_removed_on_tokens_they_were_not_fitted_to() -> None:
    experts, inputs = _layer()
    kept = [torch.arange(0, D_FF, 2), torch.arange(1, D_FF, 2)]
    found = refit_experts(experts, kept, inputs, CPU)
    _, held = inputs.split()
    assert found.refused == ()
    for e, (own, down) in enumerate(zip(kept, found.down, strict=True)):
        assert down is not None
        before = _error(experts, held, e, own, experts.down[experts.rows(e)][own])
        assert _error(experts, held, e, own, down) < 0.8 * before


@pytest.mark.parametrize(
    ("tokens", "widest"), [(60, WIDEST), (TOKENS, D_FF - 1)], ids=["few tokens", "too wide"]
)
def test_experts_without_a_gram_matrix_are_left_alone(
    tokens: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "WIDEST", widest)
    experts, inputs = _layer(tokens=tokens)
    found = refit_experts(experts, [torch.arange(9)] * 2, inputs, CPU)
    assert (found.down, found.refused) == ([None, None], ())


def test_a_fit_that_held_back_tokens_do_not_bear_out_is_refused_and_named() -> None:
    experts, inputs = _layer()
    # What is held back is nothing like what is fitted to.
    inputs.x[-TOKENS // 8 :] = -3 * torch.randn(TOKENS // 8, D_MODEL).flip(0)
    inputs.x[: -TOKENS // 8] = inputs.x[0] * (1 + 1e-3 * torch.randn(TOKENS * 7 // 8, 1))
    found = refit_experts(experts, [torch.arange(9)] * 2, inputs, CPU)
    assert (found.down, found.refused) == ([None, None], (0, 1))


def test_a_fit_beyond_the_range_of_the_dtype_is_refused() -> None:
    experts, inputs = _layer()
    # Nearly the same activation with a tiny down vector has to stand for one of 6e4.
    experts.gate[0] = experts.gate[1]
    experts.up[0] = 0.2 * experts.up[1]
    experts.down[1] = 6e4
    half = RaggedTier(experts.gate.half(), experts.up.half(), experts.down.half(), experts.offsets)
    kept = torch.tensor([j for j in range(D_FF) if j != 1])
    found = refit_experts(half, [kept, torch.arange(D_FF)], inputs, CPU)
    assert (found.down, found.refused) == ([None, None], (0,))


def test_tokens_choose_what_elimination_leaves_of_an_expert_by_falling_energy() -> None:
    experts, inputs = _layer()
    asked = [torch.arange(9), torch.arange(D_FF)]
    found = refit_experts(experts, asked, inputs, CPU, choosing=True)
    assert found.kept[1].equal(asked[1])
    x, down = inputs.x[inputs.tokens[0]].double(), experts.down[:D_FF].double()
    gate, up = experts.gate[:D_FF].double(), experts.up[:D_FF].double()
    phi = functional.silu(x @ gate.T) * (x @ up.T) * inputs.weights[0][:, None]
    (order,), _ = eliminate(shrunk(phi.T @ phi, len(phi))[None], down[None])
    assert set(found.kept[0].tolist()) == set(order[-9:].tolist())
    energies = phi.square().sum(0) * down.square().sum(1)
    assert (energies[found.kept[0]].diff() <= 0).all()
    alone = refit_experts(experts, [found.kept[0], asked[1]], inputs, CPU)
    assert found.down[0] is not None
    assert found.down[0].equal(alone.down[0])


def test_a_fit_beyond_the_range_of_the_dtype_it_is_stored_in_is_refused() -> None:
    experts, inputs = _layer()
    experts.gate[0] = experts.gate[1]
    experts.up[0] = 0.2 * experts.up[1]
    experts.down[1] = 6e4
    kept = [torch.tensor([j for j in range(D_FF) if j != 1]), torch.arange(D_FF)]
    assert refit_experts(experts, kept, inputs, CPU).refused == ()
    found = refit_experts(experts, kept, inputs, CPU, stored=torch.float16)
    assert (found.down, found.refused) == ([None, None], (0,))


def test_a_fit_that_no_held_back_token_judges_is_refused() -> None:
    experts, inputs = _layer()
    early = tuple(own[own < TOKENS // 2] for own in inputs.tokens)
    inputs = RoutedInputs(inputs.x, early, tuple(torch.ones(len(own)) for own in early))
    found = refit_experts(experts, [torch.arange(9)] * 2, inputs, CPU)
    assert (found.down, found.refused) == ([None, None], (0, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("place", [(0, 1), (2, 2)])
def test_what_is_no_gram_matrix_fits_nothing(bad: float, place: tuple[int, int]) -> None:
    phi, down = _expert()
    gram = phi.T @ phi
    gram[place] = gram[place[::-1]] = bad
    fitted, _ = refit_down(gram, gram, down, torch.tensor([0, 1, 2]))
    assert fitted is None


@pytest.mark.parametrize("kept", [1, 2])
def test_an_expert_with_one_micro_expert_left_is_no_worse(kept: int) -> None:
    experts, inputs = _layer()
    rows = [torch.arange(kept), torch.arange(D_FF - kept, D_FF)]
    found = refit_experts(experts, rows, inputs, CPU)
    _, held = inputs.split()
    for e, (own, down) in enumerate(zip(rows, found.down, strict=True)):
        before = _error(experts, held, e, own, experts.down[experts.rows(e)][own])
        assert down is None or _error(experts, held, e, own, down) < before


@pytest.mark.parametrize("zeroed", ["gate", "up", "down"])
def test_experts_that_do_nothing_are_left_alone(zeroed: str) -> None:
    experts, inputs = _layer()
    getattr(experts, zeroed).zero_()
    assert refit_experts(experts, [torch.arange(9)] * 2, inputs, CPU).down == [None, None]
