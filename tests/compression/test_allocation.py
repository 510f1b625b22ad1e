"""Plans and sizes over all layers of a model, on surveys of random worth."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera_serve import TierPlan
from camera_serve.compression.allocation import (
    KEPT_OF_A_LAYER,
    RELATIVE_ERROR,
    TRUSTED,
    USUAL_COUNTS,
    fill,
    least_bytes,
    losses_of,
    select_over_model,
    with_predictions,
)
from camera_serve.ranking.selection import LayerEnergies, Selection
from camera_serve.ranking.survey import LayerSurvey

COSTS = {16: 4096, 8: 2176, 4: 1152, 3: 896, 2: 640, 1: 384, 0: 0}
"""Bytes of a micro-expert of about 700 weights."""


def _made_up(
    num_layers: int,
    weights: list[float],
    d_ff: int = 32,
    experts: int = 4,
    shared: int = 0,
    seed: int = 1,
) -> list[LayerSurvey]:
    """Surveys of random worth."""
    generator = torch.Generator().manual_seed(seed)
    surveys = []
    for layer in range(num_layers):
        energies = torch.rand(experts, d_ff, generator=generator, dtype=torch.float64) ** 4
        costs = [own.sort().values for own in energies]
        order = [own.argsort() for own in energies]
        tokens = torch.full((experts,), 100)
        of_shared = torch.rand(shared, generator=generator, dtype=torch.float64)
        if shared:
            costs.append(of_shared.sort().values)
            order.append(of_shared.argsort())
        found = LayerEnergies(energies, of_shared, tokens)
        # Without weights, worth is energy.
        norms = tuple(torch.zeros_like(own) for own in costs)
        surveys.append(
            LayerSurvey(
                found,
                weights[layer],
                tuple(order),
                tuple(costs),
                norms,
                torch.ones(len(order)).bool(),
            )
        )
    return surveys


@pytest.mark.parametrize("plan", ["16:0.6,0:0.4", "3:0.2,2:0.6,1:0.2", "16:0.1,4:0.3,2:0.3,0:0.3"])
@pytest.mark.parametrize("align", [1, 8])
def test_the_shares_are_of_the_whole_model(plan: str, align: int) -> None:
    surveys = _made_up(3, [1.0, 3.0, 0.2])
    parsed = TierPlan.parse(plan)
    selections = select_over_model(surveys, parsed, align)
    total = 3 * 4 * 32
    for tier, bits in enumerate(parsed.bits):
        share = next(t.fraction for t in parsed.tiers if t.bits == bits)
        count = sum(sum(tiers[tier] for tiers in s.layout.experts) for s in selections)
        assert abs(count - share * total) <= align
    for selection in selections:
        for tiers, kept in zip(selection.layout.experts, selection.experts, strict=True):
            assert len(kept) == sum(tiers) == len(set(kept.tolist()))
            assert all(count % align == 0 for count in tiers)


def test_layers_whose_output_matters_more_keep_more() -> None:
    surveys = _made_up(3, [1.0, 10.0, 0.1])
    kept = [
        sum(selection.layout.expert_d_ff)
        for selection in select_over_model(surveys, TierPlan.prune(0.5), 1)
    ]
    assert kept[1] > kept[0] > kept[2]


def test_no_layer_is_emptied() -> None:
    surveys = _made_up(3, [1.0, 1.0, 1e-12])
    selections = select_over_model(surveys, TierPlan.prune(0.6), 1)
    assert sum(selections[2].layout.expert_d_ff) == math.ceil(KEPT_OF_A_LAYER * 4 * 32)


def test_what_stays_is_what_would_have_gone_last_by_falling_energy() -> None:
    (survey,) = _made_up(1, [1.0])
    # Another order than that of the energies.
    order = tuple(torch.randperm(32) for _ in survey.order)
    survey = replace(survey, order=order)
    (selection,) = select_over_model([survey], TierPlan.prune(0.5), 1)
    for expert, kept in enumerate(selection.experts):
        assert set(kept.tolist()) == set(order[expert][32 - len(kept) :].tolist())
        assert (survey.energies.experts[expert][kept].diff() <= 0).all()


def counts_of(selections: list[Selection]) -> dict[int, int]:
    """Micro-experts at each stored bit-width."""
    found = dict.fromkeys(COSTS, 0)
    for selection in selections:
        for tiers in (*selection.layout.experts, *selection.layout.shared):
            for bits, count in zip(selection.bits, tiers, strict=True):
                found[bits] += count
    return found


def bytes_of(selections: list[Selection]) -> int:
    return sum(COSTS[bits] * count for bits, count in counts_of(selections).items())


def loss_of(surveys: list[LayerSurvey], selections: list[Selection]) -> float:
    """Σ c · E · ρ over all micro-experts."""
    lost = 0.0
    for survey, selection in zip(surveys, selections, strict=True):
        layouts = [*selection.layout.experts, *selection.layout.shared]
        kept = [*selection.experts, *selection.shared]
        for own, tiers, indices in zip(survey.energies.per_expert, layouts, kept, strict=True):
            loss = torch.ones(len(own), dtype=torch.float64)
            spans = indices.split(list(tiers))
            for bits, span in zip(selection.bits, spans, strict=True):
                loss[span] = RELATIVE_ERROR[bits]
            lost += survey.weight * float((own * loss).sum())
    return lost


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1),
    allowed=st.sets(st.sampled_from([16, 8, 4, 3, 2, 1]), min_size=1),
    removes=st.booleans(),
    align=st.sampled_from([1, 4, 16]),
    shared=st.sampled_from([0, 16, 64]),
    seed=st.integers(0, 9),
)
def test_a_size_is_met_and_never_exceeded(
    share: float, allowed: set[int], removes: bool, align: int, shared: int, seed: int
) -> None:
    surveys = _made_up(3, [1.0, 20.0, 1e-9], shared=shared, seed=seed)
    costs = {bits: COSTS[bits] for bits in (*allowed, *([0] if removes else []))}
    widths = [4 * 32 + shared] * 3
    least, most = least_bytes(widths, costs, align), max(costs.values()) * sum(widths)
    budget = least + round(share * (most - least))
    selections = fill(surveys, costs, budget, align)
    assert budget - align * max(costs.values()) < bytes_of(selections) <= budget
    for selection in selections:
        assert set(selection.bits) <= allowed
        assert all(count % align == 0 for tiers in selection.layout.experts for count in tiers)
        assert sum(selection.layout.expert_d_ff) + sum(selection.layout.shared_d_ff) > 0


def test_a_size_is_filled_as_well_as_by_any_choice_of_bits() -> None:
    surveys = _made_up(2, [1.0, 3.0], d_ff=3, experts=1)
    costs = {bits: COSTS[bits] for bits in (4, 2, 0)}
    each = [survey.weight * float(e) for survey in surveys for e in survey.energies.experts[0]]
    for budget in range(6 * 640, 6 * 1152, 512):
        best = math.inf
        for bits in itertools.product(costs, repeat=6):
            if sum(costs[b] for b in bits) <= budget:
                losses = [e * RELATIVE_ERROR[b] for e, b in zip(each, bits, strict=True)]
                best = min(best, sum(losses))
        found = loss_of(surveys, fill(surveys, costs, budget, 1))
        # A knapsack's rest: at most one micro-expert is not as well off as it might be.
        assert best - 1e-12 <= found <= best + max(each) * RELATIVE_ERROR[2]


def test_bits_that_a_mixture_of_others_beats_are_not_used() -> None:
    surveys = _made_up(2, [1.0, 1.0])
    costs = {16: 4096, 2: 640, 1: 600, 0: 0}
    found = counts_of(fill(surveys, costs, 100_000, 1))
    assert found[2] and not found[1]


def test_one_bit_width_leaves_nothing_to_choose() -> None:
    (selection,) = fill(_made_up(1, [1.0]), {2: 640}, 640 * 128, 4)
    assert selection.bits == (2,) and selection.layout.expert_d_ff == (32,) * 4


def test_micro_experts_without_energy_are_removed_first() -> None:
    surveys = _made_up(2, [1.0, 1.0])
    surveys[0].energies.experts[1] = 0
    first, _ = fill(surveys, COSTS, 200_000, 1)
    assert first.layout.expert_d_ff[1] == 0


@pytest.mark.parametrize("plan", ["16:0.6,0:0.4", "2:0.5,0:0.5", "4:0.1,2:0.2,0:0.7", "2:1"])
@pytest.mark.parametrize("align", [1, 8, 32])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1e-12, 1.0), (1e-200, 1.0, 1e200)])
def test_no_plan_empties_a_layer_whatever_it_is_worth(
    plan: str, align: int, weights: tuple[float, ...]
) -> None:
    surveys = _made_up(len(weights), list(weights))
    parsed = TierPlan.parse(plan)
    selections = select_over_model(surveys, parsed, align)
    share = min(KEPT_OF_A_LAYER, (1 - parsed.pruned) / 2)
    for selection in selections:
        kept = sum(selection.layout.expert_d_ff)
        assert kept >= max(align, math.floor(share * 4 * 32 / align) * align)
        assert all(count % align == 0 for tiers in selection.layout.experts for count in tiers)


@pytest.mark.parametrize("energy", [0.0, 1e-320, 1.0])
@pytest.mark.parametrize("goal", ["16:0.6,0:0.4", "3:0.2,2:0.4,0:0.4", "size"])
def test_micro_experts_that_are_worth_the_same_are_kept_by_the_share(
    energy: float, goal: str
) -> None:
    surveys = _made_up(2, [1.0, 1.0])
    for survey in surveys:
        for own in (*survey.energies.experts, *survey.costs):
            own.fill_(energy)
    if goal == "size":
        selections = fill(surveys, COSTS, 100_000, 8)
        assert 100_000 - 8 * COSTS[16] < bytes_of(selections) <= 100_000
    else:
        selections = select_over_model(surveys, TierPlan.parse(goal), 8)
        kept = sum(sum(selection.layout.expert_d_ff) for selection in selections)
        assert abs(kept - 0.6 * 256) <= 8
    assert all(sum(selection.layout.expert_d_ff) for selection in selections)


def test_experts_that_were_not_taken_apart_are_told_where_that_decides() -> None:
    apart = torch.tensor([True, False, True, False])
    surveys = [replace(survey, apart=apart) for survey in _made_up(2, [1.0, 1.0])]
    pruned = select_over_model(surveys, TierPlan.prune(0.5), 1)
    packed = select_over_model(surveys, TierPlan.parse("3:0.5,0:0.5"), 1)
    assert [s.by_energy for s in (*pruned, *packed)] == [(1, 3), (1, 3), (), ()]


def test_losses_are_those_that_were_measured_of_the_model() -> None:
    surveys = _made_up(3, [1.0] * 3)
    assert losses_of(surveys) == RELATIVE_ERROR
    surveys[0] = replace(surveys[0], losses={2: 0.05, 1: 0.2})
    surveys[2] = replace(surveys[2], losses={2: 0.3})
    usual = RELATIVE_ERROR
    wanted = {
        2: (usual[2] ** USUAL_COUNTS * 0.05 * 0.3) ** (1 / (USUAL_COUNTS + 2)),
        1: (usual[1] ** USUAL_COUNTS * 0.2) ** (1 / (USUAL_COUNTS + 1)),
    }
    assert losses_of(surveys) == pytest.approx(usual | wanted)


def test_the_more_layers_are_measured_the_less_the_usual_counts() -> None:
    found = []
    for count in (1, 4, 48):
        surveys = _made_up(count, [1.0] * count)
        measured = [replace(survey, losses={2: 0.16}) for survey in surveys]
        found.append(losses_of(measured)[2])
    assert RELATIVE_ERROR[2] < found[0] < found[1] < found[2] < 0.16
    assert found[2] == pytest.approx(0.16, rel=0.06)


def test_losses_are_bounded_and_never_fall_with_fewer_bits() -> None:
    measured = {4: 1e-9, 3: 0.5, 2: 0.03, 1: 9.0}
    surveys = [replace(survey, losses=measured) for survey in _made_up(40, [1.0] * 40)]
    losses = losses_of(surveys)
    assert RELATIVE_ERROR[4] / TRUSTED < losses[4] < RELATIVE_ERROR[4] / TRUSTED * 1.2
    assert losses[3] < RELATIVE_ERROR[3] * TRUSTED
    assert losses[3] == losses[2]
    assert losses[1] == losses[0] == 1.0


def test_bits_that_lose_more_in_this_model_are_given_to_fewer() -> None:
    surveys = _made_up(3, [1.0] * 3)
    found = {}
    for factor in (0.5, 1, 2):
        losses = {2: factor * RELATIVE_ERROR[2]}
        measured = [replace(survey, losses=losses) for survey in surveys]
        selections = fill(measured, COSTS, 3 * 4 * 32 * 640, 1)
        found[factor] = counts_of(selections)[2]
    assert found[0.5] > found[1] > found[2]


def test_a_prediction_is_what_the_selection_minimises() -> None:
    surveys = _made_up(3, [2.0] * 3, shared=16)
    selections = with_predictions(surveys, fill(surveys, COSTS, 3 * 4 * 32 * 500, 1))
    energies = [sum(map(float, map(sum, s.energies.per_expert))) for s in surveys]
    lost = sum(2 * s.predicted_error * e for s, e in zip(selections, energies, strict=True))
    assert lost == pytest.approx(loss_of(surveys, selections))


def test_removal_is_predicted_by_what_taking_out_costs() -> None:
    (survey,) = _made_up(1, [1.0])
    cheaper = replace(survey, costs=tuple(own / 4 for own in survey.costs))
    for own in (survey, cheaper):
        selections = select_over_model([own], TierPlan.prune(0.5), 1)
        (selection,) = with_predictions([own], selections)
        gone = 1 - selection.energy_kept
        assert selection.predicted_error == pytest.approx(gone / (4 if own is cheaper else 1))
