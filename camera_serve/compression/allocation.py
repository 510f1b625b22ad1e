"""Which micro-experts of a whole model are kept, and at how many bits each.

A micro-expert j of layer l adds about c_l · E_j · ρ(b) to what the model gets wrong when it is
stored in b bits: E_j its energy (`LayerSurvey.worth`), c_l the weight of its layer, ρ(b) the share
of it that b bits lose (`losses_of`). With μ for the worth of a byte, each takes the bits of least
c_l · E_j · ρ(b) + μ · bytes(b), and μ is bisected until all of them fill the budget.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from camera_serve.errors import RecipeError
from camera_serve.ragged.layout import kept_counts, rank, tier_counts, tier_totals
from camera_serve.ranking.selection import Selection, selection_of
from camera_serve.ranking.survey import LayerSurvey
from camera_serve.recipe import Tier, TierPlan

KEPT_OF_A_LAYER = 0.05
"""At least this share of a layer's micro-experts stays: a layer is never emptied."""

RELATIVE_ERROR: Mapping[int, float] = {
    16: 0.0,
    8: 2e-5,
    4: 0.005,
    3: 0.02,
    2: 0.08,
    1: 0.35,
    0: 1.0,
}
"""ρ where it is not measured: the share of a micro-expert's energy that so many bits lose."""

TRUSTED = 4.0
"""A layer's measured ρ counts as at most so many times the usual one, and at least 1 / that."""

USUAL_COUNTS = 4
"""The usual ρ counts as so many measured layers: layers differ twofold, and few may be measured."""

_BISECTIONS = 100


def select_over_model(
    surveys: Sequence[LayerSurvey], plan: TierPlan, align: int
) -> list[Selection]:
    """The micro-experts a plan keeps of each layer, its shares being those of all these layers.

    A plan that only removes goes by what taking out costs, one with packed tiers by energies.
    Raises `RecipeError` for one that leaves too little for all of them.
    """
    layers = [_scores(survey, plan.bits) for survey in surveys]
    flat = [own for layer in layers for own in layer]
    totals = tier_totals(plan, sum(map(len, flat)), align)
    widths = _widths(layers, sum(totals.values()), align)
    best = [own.topk(width).values for own, width in zip(flat, widths, strict=True)]
    counts = iter(_tiers(best, totals, align))
    return [
        _selection(survey, plan.bits, [next(counts) for _ in layer])
        for survey, layer in zip(surveys, layers, strict=True)
    ]


def check_leaves_enough(plan: TierPlan, micro_experts: Sequence[int], align: int) -> None:
    """Refuse a plan for a whole model that leaves too little for each of its layers to stay.

    micro_experts: how many are in each layer. Raises `RecipeError`.
    """
    kept = sum(tier_totals(plan, sum(micro_experts), align).values())
    _least(micro_experts, kept, align)


def fill(
    surveys: Sequence[LayerSurvey], costs: Mapping[int, int], budget: int, align: int
) -> list[Selection]:
    """The micro-experts that fit into a budget, at the bits that serve the model best.

    costs: bytes of a micro-expert at each bit-width that is allowed; budget: bytes of all of them,
    not below `least_bytes`. Each expert's width in each tier is a multiple of `align`. What is left
    of the budget is less than moving `align` micro-experts up a tier takes.
    """
    levels = tuple(sorted(costs, reverse=True))
    if set(levels) <= {16, 0}:
        total = sum(len(own) for survey in surveys for own in survey.energies.per_expert)
        kept = min(budget // (align * costs[16]) * align, total)
        shares = {16: kept / total, 0: 1 - kept / total}
        tiers = tuple(Tier(bits=bits, fraction=share) for bits, share in shares.items() if share)
        return select_over_model(surveys, TierPlan(tiers=tiers), align)
    experts = _Experts.of(surveys, levels, align)
    steps = _hull(costs, losses_of(surveys))
    counted = experts.counts(experts.filled(steps, costs, budget))
    stored = [level for level, bits in enumerate(levels) if bits and counted[:, level].any()]
    counts = iter(counted[:, stored].tolist())
    bits = tuple(levels[level] for level in stored)
    return [
        _selection(survey, bits, [next(counts) for _ in survey.energies.per_expert])
        for survey in surveys
    ]


def losses_of(surveys: Sequence[LayerSurvey]) -> dict[int, float]:
    """ρ of this model: the geometric mean of `RELATIVE_ERROR` and what was measured in its layers.

    Fewer bits never lose less than more bits, nor more than removal. One for all layers: each at
    its own serves the model worse.
    """
    losses = {}
    least = 0.0
    for bits, usual in sorted(RELATIVE_ERROR.items(), reverse=True):
        measured = [own.losses[bits] for own in surveys if bits in own.losses]
        trusted = [min(max(each, usual / TRUSTED), usual * TRUSTED) for each in measured]
        mean = statistics.geometric_mean([usual] * USUAL_COUNTS + trusted) if trusted else usual
        losses[bits] = least = min(max(mean, least), RELATIVE_ERROR[0])
    return losses


def with_predictions(
    surveys: Sequence[LayerSurvey], selections: Sequence[Selection]
) -> list[Selection]:
    """The selections, and what each is expected to lose of the energy of its layer."""
    losses = losses_of(surveys)
    return [
        replace(selection, predicted_error=_predicted_error(survey, selection, losses))
        for survey, selection in zip(surveys, selections, strict=True)
    ]


def _predicted_error(
    survey: LayerSurvey, selection: Selection, losses: Mapping[int, float]
) -> float:
    """Σ_j E_j ρ(b_j) / Σ_j E_j; of a selection that only removes, what removal costs, for E_j ρ."""
    layouts = (*selection.layout.experts, *selection.layout.shared)
    kept = (*selection.experts, *selection.shared)
    energies = survey.energies.per_expert
    removal = survey.removal_scores if selection.bits == (16,) else energies
    lost = 0.0
    for own, gone, tiers, indices in zip(energies, removal, layouts, kept, strict=True):
        lost += losses[0] * float(gone.sum() - gone[indices].sum())
        for bits, span in zip(selection.bits, indices.split(list(tiers)), strict=True):
            lost += losses[bits] * float(own[span].sum())
    total = sum(float(own.sum()) for own in energies)
    return max(lost, 0.0) / total if total else 0.0


def expected_loss(surveys: Sequence[LayerSurvey], selections: Sequence[Selection]) -> float:
    """About which share of the experts' energy is lost, layers weighed as they matter.

    selections: with their predictions (`with_predictions`).
    """
    whole = [
        survey.weight * sum(float(own.sum()) for own in survey.energies.per_expert)
        for survey in surveys
    ]
    lost = [
        total * (selection.predicted_error or 0.0)
        for total, selection in zip(whole, selections, strict=True)
    ]
    return sum(lost) / sum(whole) if sum(whole) else 0.0


def least_bytes(micro_experts: Sequence[int], costs: Mapping[int, int], align: int) -> int:
    """What the experts take at least, when so many are in each layer."""
    cheapest = min(cost for bits, cost in costs.items() if bits)
    if 0 not in costs:
        return cheapest * sum(micro_experts)
    return cheapest * sum(_least(micro_experts, sum(micro_experts), align))


def _least(micro_experts: Sequence[int], kept: int, align: int) -> list[int]:
    """What each layer keeps at least when so many are kept of all: some of it, but fair."""
    share = min(KEPT_OF_A_LAYER, kept / sum(micro_experts) / 2)
    least = [max(1, math.ceil(share * count / align)) * align for count in micro_experts]
    if sum(least) > kept:
        raise RecipeError(
            f"{kept} of {sum(micro_experts)} micro-experts are kept, and {len(least)} MoE layers "
            f"keep {sum(least)} at least, in multiples of {align}: keep more, or use a smaller "
            "--align"
        )
    return least


def _scores(survey: LayerSurvey, bits: tuple[int, ...]) -> list[torch.Tensor]:
    """What each micro-expert is worth to the model, expert by expert."""
    each = survey.removal_scores if bits == (16,) else survey.worth
    return [survey.weight * own for own in each]


def _widths(layers: Sequence[list[torch.Tensor]], kept: int, align: int) -> list[int]:
    """How many micro-experts of each expert are kept, of all layers together."""
    lifted = []
    least = _least([*map(_total, layers)], kept, align)
    for layer, count in zip(layers, least, strict=True):
        every = torch.cat(layer)
        every[every.topk(count).indices] = torch.inf
        lifted += every.split([len(own) for own in layer])
    return kept_counts(lifted, kept, align, _in_any_case(layers, least, align))


def _in_any_case(
    layers: Sequence[list[torch.Tensor]], least: Sequence[int], align: int
) -> list[int]:
    """How many micro-experts of each expert stay whatever the other layers are worth.

    least: how many of each layer do.
    """
    return [
        width
        for layer, count in zip(layers, least, strict=True)
        for width in kept_counts(layer, count, align, [0] * len(layer))
    ]


def _total(layer: Sequence[torch.Tensor]) -> int:
    return sum(map(len, layer))


def _tiers(
    scores: Sequence[torch.Tensor], totals: Mapping[int, int], align: int
) -> list[tuple[int, ...]]:
    """How many micro-experts of each expert are in each stored tier, which have these totals."""
    used = {bits: count for bits, count in totals.items() if count}
    tiers = tuple(Tier(bits=b, fraction=n / sum(used.values())) for b, n in used.items())
    found = tier_counts(scores, TierPlan(tiers=tiers), align)
    return [
        tuple(dict(zip(used, counts, strict=True)).get(bits, 0) for bits in totals)
        for counts in found
    ]


def _selection(
    survey: LayerSurvey, bits: tuple[int, ...], counts: Sequence[Sequence[int]]
) -> Selection:
    kept = [
        _kept(survey, expert, sum(tiers[: len(bits)]), bits) for expert, tiers in enumerate(counts)
    ]
    selection = selection_of(survey.energies, bits, counts, kept)
    by_energy = (~survey.apart).nonzero().flatten().tolist() if bits == (16,) else []
    return replace(selection, by_energy=tuple(by_energy))


def _kept(survey: LayerSurvey, expert: int, width: int, bits: tuple[int, ...]) -> torch.Tensor:
    """The micro-experts of one expert that stay, by falling energy."""
    energies = survey.energies.per_expert[expert]
    if bits == (16,):
        stay = survey.order[expert][len(energies) - width :].sort().values
        return stay[rank(energies[stay])]
    return rank(survey.worth[expert])[:width]


@dataclass(frozen=True)
class _Step:
    """From one level of bits to the next lower one that is worth taking.

    levels: their numbers, from the most bits; saved: bytes of a micro-expert; lost: of its score.
    """

    levels: tuple[int, int]
    saved: int
    lost: float


def _hull(costs: Mapping[int, int], losses: Mapping[int, float]) -> list[_Step]:
    """The steps down that are worth taking: each loses more per byte than the one before.

    Bit-widths that lose more than a mixture of their neighbours at the same bytes are left out.
    """
    levels = sorted(costs, reverse=True)
    hull: list[int] = []

    def rate(upper: int, lower: int) -> float:
        lost = losses[levels[lower]] - losses[levels[upper]]
        return lost / (costs[levels[upper]] - costs[levels[lower]])

    for level in reversed(range(len(levels))):
        if hull and losses[levels[level]] >= losses[levels[hull[-1]]]:
            continue
        while len(hull) > 1 and rate(level, hull[-1]) >= rate(hull[-1], hull[-2]):
            hull.pop()
        hull.append(level)
    steps = []
    for lower, upper in pairwise(hull):
        more, fewer = levels[upper], levels[lower]
        steps.append(
            _Step((upper, lower), costs[more] - costs[fewer], losses[fewer] - losses[more])
        )
    return steps[::-1]


@dataclass(frozen=True)
class _Experts:
    """All experts of a model as rows of one matrix, narrower ones padded.

    scores: float64 `[num_experts, max_width]`, each row rising, -inf where it is padded; widths,
    kept: int64 `[num_experts]`, micro-experts there are, and that stay in any case; levels: the
    bit-widths, falling.
    """

    scores: torch.Tensor
    widths: torch.Tensor
    kept: torch.Tensor
    levels: tuple[int, ...]
    align: int

    @classmethod
    def of(cls, surveys: Sequence[LayerSurvey], levels: tuple[int, ...], align: int) -> "_Experts":
        layers = [[survey.weight * own for own in survey.worth] for survey in surveys]
        rows = [own for layer in layers for own in layer]
        scores = rows[0].new_full((len(rows), max(map(len, rows))), -torch.inf)
        for row, own in zip(scores, rows, strict=True):
            row[len(row) - len(own) :] = own.sort().values
        widths = torch.tensor([len(own) for own in rows])
        least = _least([*map(_total, layers)], _total(rows), align)
        kept = torch.tensor(_in_any_case(layers, least, align))
        return cls(scores, widths, kept, levels, align)

    def counts(self, ends: torch.Tensor) -> torch.Tensor:
        """How many micro-experts of each expert are at each level."""
        return ends.diff(prepend=ends.new_zeros(len(ends), 1), dim=1)

    def filled(self, steps: Sequence[_Step], costs: Mapping[int, int], budget: int) -> torch.Tensor:
        """How many micro-experts of each expert are at each level or above, `[.., num_levels]`."""
        by_level = torch.tensor([costs[bits] for bits in self.levels])

        def rest_of(ends: torch.Tensor) -> int:
            return budget - int((self.counts(ends) * by_level).sum())

        rates = [step.lost / step.saved for step in steps]
        seen = self.scores[self.scores > 0]
        low, high = 1.0, 1.0
        if rates and len(seen):
            low, high = float(seen.min()) * min(rates) / 2, float(seen.max()) * max(rates) * 2
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            fits = rest_of(self._ends(steps, middle)) >= 0
            low, high = (low, middle) if fits else (middle, high)
        ends = self._ends(steps, high)
        rest = rest_of(ends)
        while (left := self._spend(ends, steps, rest)) < rest:
            rest = left
        return ends

    def _ends(self, steps: Sequence[_Step], worth: float) -> torch.Tensor:
        """What each micro-expert takes when a byte is worth so much, in multiples of `align`."""
        least = self.scores.new_full((len(self.levels),), torch.inf)
        least[-1] = -torch.inf
        for step in steps:
            least[slice(*step.levels)] = worth * step.saved / step.lost
        below = torch.searchsorted(self.scores, least.repeat(len(self.scores), 1))
        exact = (self.scores.shape[1] - below).minimum(self.widths[:, None])
        ends = (exact + self.align // 2) // self.align * self.align
        if self.levels[-1] == 0:
            ends[:, -2] = ends[:, -2].maximum(self.kept)
        return ends

    def _spend(self, ends: torch.Tensor, steps: Sequence[_Step], rest: int) -> int:
        """Move up what gains most per byte while it fits, in place; the bytes left then."""
        offers = []
        gains = self._gains(ends)
        for expert, own in enumerate(gains.tolist()):
            for step in steps:
                gain = own[step.levels[0]] * step.lost / step.saved
                offers.append((-gain, step.saved * self.align, expert, step.levels))
        for _, price, expert, (upper, lower) in sorted(offers):
            if price <= rest and ends[expert, upper] + self.align <= ends[expert, lower]:
                ends[expert, upper:lower] += self.align
                rest -= price
        return rest

    def _gains(self, ends: torch.Tensor) -> torch.Tensor:
        """The scores of the next `align` micro-experts below each level, summed."""
        sums = torch.nn.functional.pad(self.scores.clamp(min=0).cumsum(1), (1, 0))
        first = self.scores.shape[1] - ends
        return sums.gather(1, first) - sums.gather(1, (first - self.align).clamp(min=0))
