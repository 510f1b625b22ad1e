"""Ranking + tier plan -> layout: how many micro-experts each expert keeps in each tier.

The layout is the only thing that describes a ragged layer. Row order is expert by expert, tier by
tier, and inside a tier by falling energy (Algorithm 2, lines 10-13; Algorithm 3, lines 5-8).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera_serve.errors import RecipeError
from camera_serve.recipe import TierPlan


@dataclass(frozen=True)
class LayerLayout:
    """Kept micro-experts of one MoE layer: `experts[e][t]`, `shared[s][t]` for tier t of the plan.

    Tiers of 0 bits are not listed: what is absent was pruned.
    """

    experts: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def expert_d_ff(self) -> tuple[int, ...]:
        """The d_ff each routed expert keeps, all tiers together."""
        return tuple(sum(tiers) for tiers in self.experts)

    @property
    def shared_d_ff(self) -> tuple[int, ...]:
        """The d_ff each shared expert keeps, all tiers together."""
        return tuple(sum(tiers) for tiers in self.shared)


def rank(energies: torch.Tensor) -> torch.Tensor:
    """Micro-experts by falling energy (Algorithm 1, line 11), ties by index.

    energies: float `[num_micro_experts]`; returns int64 `[num_micro_experts]`.
    """
    return torch.sort(energies, descending=True, stable=True).indices


def tier_counts(
    energies: Sequence[torch.Tensor], plan: TierPlan, align: int
) -> tuple[tuple[int, ...], ...]:
    """How many micro-experts of each expert fall in each tier of `plan`, 0 bits included.

    energies: one float tensor `[d_ff_e]` per expert of the layer, shared experts last. The counts
    of every expert are multiples of `align`, sum to its d_ff, and sum over experts to the plan's
    share of the layer, itself rounded to a multiple of `align`.
    """
    widths = [len(e) for e in energies]
    check_alignment(widths, align)
    order = rank(torch.cat(list(energies)))
    owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))[order]
    boundaries = _boundaries(plan, sum(widths), align)
    previous = [0] * len(widths)
    columns = []
    for end in boundaries:
        exact = torch.bincount(owner[:end], minlength=len(widths)).tolist()
        units = _round_to_total(
            [n / align for n in exact],
            total=end // align,
            lower=[n // align for n in previous],
            upper=[n // align for n in widths],
        )
        current = [u * align for u in units]
        columns.append([now - before for now, before in zip(current, previous, strict=True)])
        previous = current
    return tuple(zip(*columns, strict=True))


def kept_counts(
    energies: Sequence[torch.Tensor], kept: int, align: int, least: Sequence[int]
) -> list[int]:
    """How many micro-experts of each expert are among `kept` of all, and at least so many.

    energies: one float tensor `[d_ff_e]` per expert; kept, least: multiples of `align`, `least` no
    more than `kept` in sum.
    """
    widths = [len(e) for e in energies]
    order = rank(torch.cat(list(energies)))
    owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    exact = torch.bincount(owner[order[:kept]], minlength=len(widths)).tolist()
    units = _round_to_total(
        [n / align for n in exact],
        total=kept // align,
        lower=[n // align for n in least],
        upper=[n // align for n in widths],
    )
    return [u * align for u in units]


def tier_totals(plan: TierPlan, num_micro_experts: int, align: int) -> dict[int, int]:
    """How many micro-experts of a layer a plan stores at each bit-width, exactly.

    Raises `RecipeError` when it stores none.
    """
    ends = [0, *_boundaries(plan, num_micro_experts, align)]
    widths = {
        tier.bits: end - start for tier, start, end in zip(plan.tiers, ends, ends[1:], strict=False)
    }
    stored = {bits: width for bits, width in widths.items() if bits}
    if not sum(stored.values()):
        raise RecipeError(
            f"plan {plan} prunes all {num_micro_experts} micro-experts of a layer once rounded to "
            f"multiples of {align}: keep more, or use a smaller --align"
        )
    return stored


def _boundaries(plan: TierPlan, num_micro_experts: int, align: int) -> list[int]:
    share, ends = 0.0, []
    for tier in plan.tiers[:-1]:
        share += tier.fraction
        ends.append(round(num_micro_experts * share / align) * align)
    return [*ends, num_micro_experts]


def _round_to_total(
    wanted: list[float], *, total: int, lower: list[int], upper: list[int]
) -> list[int]:
    """Largest remainder: integers in [lower, upper], nearest to `wanted`, that sum to `total`."""
    counts = [
        min(max(int(w), low), high) for w, low, high in zip(wanted, lower, upper, strict=True)
    ]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        bounds = upper if step > 0 else lower
        free = [e for e in range(len(counts)) if counts[e] != bounds[e]]
        free.sort(key=lambda e: (step * (counts[e] - wanted[e]), e))
        for e in free[: abs(missing)]:
            counts[e] += step
    return counts


def check_alignment(widths: Sequence[int], align: int) -> None:
    """Refuse an `align` that does not divide every expert width, naming one that does."""
    for width in sorted(set(widths)):
        if width % align:
            common = math.gcd(*widths)
            # Coarser than this, small experts would be kept or removed as wholes.
            usable = max(a for a in (1, 2, 4, 8, 16, 32) if common % a == 0)
            raise RecipeError(
                f"align {align} does not divide the expert width {width}: use --align {usable}"
            )
