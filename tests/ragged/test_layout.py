import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from camera_serve.errors import RecipeError
from camera_serve.ragged.layout import check_alignment, rank, tier_counts, tier_totals
from camera_serve.recipe import Tier, TierPlan

PRUNE_40 = TierPlan.prune(0.4)


def energies_of(*experts: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(e, dtype=torch.float64) for e in experts]


def test_rank_is_by_falling_energy_with_ties_by_index() -> None:
    assert rank(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])).tolist() == [1, 3, 4, 0, 2]


def test_the_cut_is_exact_without_alignment() -> None:
    counts = tier_counts(
        energies_of([9, 8, 1, 1], [7, 1, 1, 1], [6, 5, 4, 1]), TierPlan.prune(0.5), 1
    )
    assert counts == ((2, 2), (1, 3), (3, 1))


def test_an_expert_may_lose_everything() -> None:
    counts = tier_counts(energies_of([0, 0, 0, 0], [5, 6, 7, 8]), TierPlan.prune(0.5), 1)
    assert counts == ((0, 4), (4, 0))


def test_one_expert_may_hold_all_of_the_top_tier() -> None:
    counts = tier_counts(energies_of([9] * 4, [1] * 4, [1] * 4), TierPlan.prune(2 / 3), 4)
    assert counts == ((4, 0), (0, 4), (0, 4))


def test_experts_of_different_width_share_one_ranking() -> None:
    counts = tier_counts(energies_of([1, 2], [9, 9, 9, 9], [3, 0]), TierPlan.prune(0.5), 1)
    assert counts == ((0, 2), (4, 0), (0, 2))


def test_alignment_rounds_by_largest_remainder() -> None:
    # 6, 3 and 3 of 12 are kept exactly; with align 4 the one full unit beyond 4+0+0 … goes to the
    # largest remainders, first expert first on a tie.
    energies = energies_of([9] * 6 + [0] * 2, [9] * 3 + [0] * 5, [9] * 3 + [0] * 5)
    assert tier_counts(energies, TierPlan.prune(0.5), 4) == ((4, 4), (4, 4), (4, 4))


def test_the_remedy_for_an_align_is_no_coarser_than_the_usual_one() -> None:
    with pytest.raises(RecipeError, match="the expert width 64: use --align 32"):
        check_alignment([64, 128], 48)


def test_align_that_does_not_divide_the_width_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        RecipeError, match="align 32 does not divide the expert width 48: use --align 16"
    ):
        tier_counts([torch.ones(48)], PRUNE_40, 32)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[torch.Tensor], TierPlan, int]:
    align = draw(st.sampled_from([1, 2, 4, 8]))
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    values = st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0, 1e-9])
    energies = [
        torch.tensor(draw(st.lists(values, min_size=w * align, max_size=w * align))) for w in widths
    ]
    kept = draw(st.floats(0.05, 0.95))
    assume(round(kept * sum(widths)) > 0)
    return (
        energies,
        TierPlan(tiers=(Tier(bits=16, fraction=kept), Tier(bits=0, fraction=1 - kept))),
        align,
    )


@given(layers())
def test_counts_are_aligned_and_sum_both_ways(
    case: tuple[list[torch.Tensor], TierPlan, int],
) -> None:
    energies, plan, align = case
    counts = tier_counts(energies, plan, align)
    total = sum(len(e) for e in energies)
    assert all(n % align == 0 and n >= 0 for tiers in counts for n in tiers)
    assert [sum(tiers) for tiers in counts] == [len(e) for e in energies]
    assert sum(tiers[0] for tiers in counts) == sum(tier_totals(plan, total, align).values())


@given(layers())
def test_counts_stay_within_one_unit_of_the_exact_cut(
    case: tuple[list[torch.Tensor], TierPlan, int],
) -> None:
    energies, plan, align = case
    counts = tier_counts(energies, plan, align)
    total = sum(len(e) for e in energies)
    top = set(rank(torch.cat(energies))[: sum(tier_totals(plan, total, align).values())].tolist())
    start = 0
    for tiers, expert in zip(counts, energies, strict=True):
        exact = sum(index in top for index in range(start, start + len(expert)))
        assert abs(tiers[0] - exact) < align
        start += len(expert)


def test_a_plan_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="prunes all 64 micro-experts of a layer once rounded"):
        tier_totals(TierPlan.prune(0.99), 64, 32)


def test_three_tiers_share_one_ranking() -> None:
    plan = TierPlan.parse("3:0.25,2:0.5,1:0.25")
    counts = tier_counts(energies_of([9, 8, 7, 1], [6, 5, 4, 3]), plan, 1)
    assert counts == ((2, 1, 1), (0, 3, 1))


def test_tiers_rounded_apart_never_cross() -> None:
    plan = TierPlan.parse("8:0.1,4:0.1,3:0.1,2:0.3,1:0.2,0:0.2")
    torch.manual_seed(3)
    counts = tier_counts([torch.rand(64) ** 8 * 10**e for e in range(6)], plan, 16)
    assert all(n >= 0 and n % 16 == 0 for tiers in counts for n in tiers)
    assert [sum(tiers) for tiers in counts] == [64] * 6
    totals = tier_totals(plan, 6 * 64, 16)
    assert [sum(column) for column in zip(*counts, strict=True)][:-1] == list(totals.values())
