"""Elimination against the definition: the least error that the best down vectors leave."""

import pytest
import torch

from camera_serve.ranking import elimination
from camera_serve.ranking.elimination import RIDGE, eliminate, shrunk


def _expert(d_ff: int, d_model: int = 5, tokens: int = 40, seed: int = 0):
    """Coefficients of which some depend on others, and their Gram matrix and down vectors."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(tokens, d_ff, generator=generator, dtype=torch.float64)
    phi[:, 1::3] = phi[:, ::3][:, : phi[:, 1::3].shape[1]] + 0.1 * phi[:, 1::3]
    phi *= torch.exp(torch.randn(d_ff, generator=generator, dtype=torch.float64))
    return phi.T @ phi, torch.randn(d_ff, d_model, generator=generator, dtype=torch.float64)


def _least_error(gram: torch.Tensor, down: torch.Tensor, gone: list[int]) -> float:
    """min over W whose rows `gone` are zero of tr((W - down)ᵀ (G + ridge) (W - down))."""
    d_ff = len(gram)
    kept = [j for j in range(d_ff) if j not in gone]
    h = gram + RIDGE * gram.diagonal().mean() * torch.eye(d_ff, dtype=torch.float64)
    fitted = torch.zeros_like(down)
    if kept:
        # H_KK (W_K - D_K) = H_KR D_R
        step = torch.linalg.solve(h[kept][:, kept], h[kept][:, gone] @ down[gone])
        fitted[kept] = down[kept] + step
    off = fitted - down
    return float(torch.trace(off.T @ h @ off))


@pytest.mark.parametrize("d_ff", [1, 2, 7, 12])
def test_each_step_takes_what_the_rest_can_make_up_for_best(
    d_ff: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "AT_ONCE", d_ff)
    gram, down = _expert(d_ff)
    order, costs = eliminate(gram[None], down[None])
    gone: list[int] = []
    total = highest = 0.0
    for chosen, cost in zip(order[0].tolist(), costs[0].tolist(), strict=True):
        errors = {
            j: _least_error(gram, down, [*gone, j]) - total for j in range(d_ff) if j not in gone
        }
        assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-6)
        highest = max(highest, errors[chosen])
        assert cost == pytest.approx(highest, rel=1e-6)
        total += errors[chosen]
        gone.append(chosen)
    assert sorted(gone) == list(range(d_ff))


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_after_several_at_once_the_next_cost_what_they_add(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "AT_ONCE", at_once)
    gram, down = _expert(14)
    step = -(-14 // at_once)
    (order,), (costs,) = eliminate(gram[None], down[None])
    highest = 0.0
    for start in range(0, 14, step):
        gone = order[:start].tolist()
        before = _least_error(gram, down, gone)
        added = {
            j: _least_error(gram, down, [*gone, j]) - before for j in range(14) if j not in gone
        }
        cheapest = sorted(added, key=added.__getitem__)[:step]
        assert order[start : start + step].tolist() == cheapest
        for chosen, cost in zip(cheapest, costs[start : start + step].tolist(), strict=True):
            highest = max(highest, added[chosen])
            assert cost == pytest.approx(highest, rel=1e-6)


def test_experts_of_a_batch_do_not_touch_each_other() -> None:
    pairs = [_expert(9, seed=seed) for seed in range(3)]
    together = eliminate(*(torch.stack(parts) for parts in zip(*pairs, strict=True)))
    for expert, (gram, down) in enumerate(pairs):
        alone = eliminate(gram[None], down[None])
        assert together.order[expert].equal(alone.order[0])
        torch.testing.assert_close(together.costs[expert], alone.costs[0])


def test_an_expert_without_tokens_costs_nothing_and_goes_by_weight() -> None:
    _, down = _expert(6)
    order, costs = eliminate(torch.zeros(1, 6, 6, dtype=torch.float64), down[None])
    assert costs.eq(0).all()
    assert order[0].tolist() == down.norm(dim=1).argsort().tolist()


def test_a_copy_goes_first_and_costs_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    phi[:, 6] = 2 * phi[:, 0]
    down = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    (order,), (costs,) = eliminate((phi.T @ phi)[None], down[None])
    assert int(order[0]) in (0, 6)
    assert costs[0] < 0.02 * costs[1]


def test_a_down_vector_of_zero_is_free() -> None:
    gram, down = _expert(6)
    down[4] = 0
    order, costs = eliminate(gram[None], down[None])
    assert order[0, 0] == 4
    assert costs[0, 0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("place", [(0, 1), (2, 2)])
def test_what_is_no_gram_matrix_costs_nan_and_leaves_the_others_of_its_batch_alone(
    bad: float, place: tuple[int, int]
) -> None:
    gram, down = _expert(6)
    damaged = gram.clone()
    damaged[place] = damaged[place[::-1]] = bad
    order, costs = eliminate(torch.stack([damaged, gram]), torch.stack([down, down]))
    assert costs[0].isnan().all()
    alone = eliminate(gram[None], down[None])
    assert order[1].equal(alone.order[0])
    torch.testing.assert_close(costs[1], alone.costs[0])


def test_dependent_and_constant_coefficients_are_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(5, 8, 4, generator=generator, dtype=torch.float64)
    one = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    phis = [one.expand(-1, 8), torch.ones(40, 8), one * torch.arange(8), one[:1].expand(1, 8)]
    grams = torch.stack([(phi.T @ phi).double() for phi in phis] + [torch.eye(8).double() * 1e-300])
    order, costs = eliminate(grams, down)
    assert costs.isfinite().all() and (costs >= 0).all()
    assert order.sort(1).values.equal(torch.arange(8).repeat(5, 1))


def _draws(tokens: int, d_ff: int = 48, seed: int = 0):
    """Coefficients of micro-experts that have nothing to do with each other, and what they are
    worth: that of twice as many tokens, so that chance has no part in it."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(d_ff, generator=generator, dtype=torch.float64))
    phi = torch.randn(tokens, d_ff, generator=generator, dtype=torch.float64) * size
    down = torch.randn(d_ff, 6, generator=generator, dtype=torch.float64)
    return phi, down, size.square() * down.square().sum(1)


@pytest.mark.parametrize("tokens", [32, 48, 96, 400])
def test_what_few_tokens_say_of_pairs_does_not_hide_what_a_micro_expert_is_worth(
    tokens: int,
) -> None:
    lost = {}
    for few in (False, True):
        total = 0.0
        for seed in range(8):
            phi, down, worth = _draws(tokens, seed=seed)
            gram = phi.T @ phi
            order = eliminate((shrunk(gram, tokens) if few else gram)[None], down[None]).order[0]
            total += float(worth[order[: len(order) * 4 // 10]].sum())
        lost[few] = total
    best = sum(float(_draws(tokens, seed=s)[2].sort().values[:19].sum()) for s in range(8))
    assert lost[True] < lost[False]
    assert lost[True] < (1.3 if tokens > 40 else 1.5) * best


def test_many_tokens_are_believed() -> None:
    gram, down = _expert(9)
    few, many = eliminate(gram[None], down[None]), shrunk(gram.clone(), 10**6)
    assert eliminate(many[None], down[None]).order.equal(few.order)
    assert many.diagonal().equal(gram.diagonal())
    torch.testing.assert_close(many, gram, rtol=1e-4, atol=0)
