"""Energies + tier plan -> which micro-experts of a layer are kept, in which order and tier."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera_serve.ragged.layer import RaggedTier
from camera_serve.ragged.layout import LayerLayout, rank, tier_counts
from camera_serve.recipe import TierPlan


@dataclass(frozen=True)
class LayerEnergies:
    """Eq. 11 for one MoE layer.

    experts: float64 `[num_experts, d_ff]`; shared: float64 `[shared_d_ff]` (length 0 without
    shared experts); tokens: int64 `[num_experts]`, calibration tokens routed to each expert.
    """

    experts: torch.Tensor
    shared: torch.Tensor
    tokens: torch.Tensor

    @property
    def per_expert(self) -> list[torch.Tensor]:
        """Energies expert by expert, shared experts last: the order of the ranking."""
        shared = [self.shared] if len(self.shared) else []
        return [*self.experts, *shared]


@dataclass(frozen=True)
class Selection:
    """Which micro-experts of each expert are kept, tier by tier and by falling energy in each.

    bits: of the tiers, falling; experts[e], shared[s]: int64 indices into the expert's original
    d_ff. energy_kept: the kept micro-experts' share of the layer's energy.
    """

    bits: tuple[int, ...]
    layout: LayerLayout
    experts: list[torch.Tensor]
    shared: list[torch.Tensor]
    energy_kept: float


def select(energies: LayerEnergies, plan: TierPlan, align: int) -> Selection:
    """The micro-experts a plan keeps of one layer (Algorithm 2, line 9; Algorithm 3, lines 5-8)."""
    per_expert = energies.per_expert
    counts = tier_counts(per_expert, plan, align)
    widths = [sum(tiers[: len(plan.bits)]) for tiers in counts]
    kept = [rank(e)[:width] for e, width in zip(per_expert, widths, strict=True)]
    return selection_of(energies, plan.bits, counts, kept)


def selection_of(
    energies: LayerEnergies,
    bits: tuple[int, ...],
    counts: Sequence[Sequence[int]],
    kept: list[torch.Tensor],
) -> Selection:
    """What is kept of a layer: by expert, the shared one last, counts of its tiers and indices.

    bits: of the stored tiers; a count of 0 bits may follow.
    """
    per_expert = energies.per_expert
    stored = len(bits)
    num_experts = len(energies.experts)
    layout = LayerLayout(
        experts=tuple(tuple(tiers[:stored]) for tiers in counts[:num_experts]),
        shared=tuple(tuple(tiers[:stored]) for tiers in counts[num_experts:]),
    )
    share = _share_kept(per_expert, kept)
    return Selection(bits, layout, kept[:num_experts], kept[num_experts:], share)


def chosen_anew(energies: LayerEnergies, selection: Selection) -> Selection:
    """As many micro-experts of each expert and tier as a selection has, by other energies."""
    per_expert = energies.per_expert
    before = [*selection.experts, *selection.shared]
    kept = [rank(e)[: len(own)] for e, own in zip(per_expert, before, strict=True)]
    number, share = len(selection.experts), _share_kept(per_expert, kept)
    return Selection(selection.bits, selection.layout, kept[:number], kept[number:], share)


def _share_kept(per_expert: list[torch.Tensor], kept: list[torch.Tensor]) -> float:
    kept_energy = sum(float(e[k].sum()) for e, k in zip(per_expert, kept, strict=True))
    total = sum(float(e.sum()) for e in per_expert)
    return kept_energy / total if total else 1.0


def select_rows(
    experts: RaggedTier[torch.Tensor], kept: list[torch.Tensor], device: torch.device
) -> RaggedTier[torch.Tensor]:
    """The kept micro-experts of 16-bit experts (Algorithm 2, line 13).

    kept: for each expert, int64 indices into its own micro-experts, in the order to keep.
    """
    rows = torch.cat([k + start for k, start in zip(kept, experts.offsets, strict=False)])
    widths = torch.tensor([0, *(len(k) for k in kept)]).cumsum(0)
    gate, up, down = (
        matrix[rows.to(device)] for matrix in (experts.gate, experts.up, experts.down)
    )
    return RaggedTier(gate, up, down, tuple(widths.tolist()))
