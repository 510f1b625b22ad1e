"""Energies + tier plan -> which micro-experts of a layer are kept, in which order and tier."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from camera_serve.ragged.layer import RaggedTier
from camera_serve.ragged.layout import LayerLayout, rank, tier_counts
from camera_serve.recipe import TierPlan

ELSEWHERE = 0.05
"""What other text uses of a micro-expert at least, as a share of what the average one is used.

On the reference MoE, 2.25 bits by 2,000 tokens of prose: it takes the KL divergence on code from
.115 to .082, and that on prose from .021 to .022.
"""


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
    d_ff. energy_kept: the kept micro-experts' share of the layer's energy. by_energy: experts, the
    shared one last, that were to be ranked by what taking out costs, and were not; predicted_error:
    the share of the energy that is expected to be lost, by a survey of the model.
    """

    bits: tuple[int, ...]
    layout: LayerLayout
    experts: list[torch.Tensor]
    shared: list[torch.Tensor]
    energy_kept: float
    by_energy: tuple[int, ...] = ()
    predicted_error: float | None = None


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


def worth_of(energies: LayerEnergies, norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Energies as far as a text tells: what it never used may be used elsewhere.

    Each micro-expert counts as though it had also acted `ELSEWHERE` times as much as the routed
    ones of its layer on average, or as those of its shared expert. norms[e]: float64 `[d_ff_e]`,
    ‖w‖² of its down vectors, the shared expert last.
    """
    kinds = [energies.experts.flatten(), energies.shared]
    found = []
    for own, sizes in zip(kinds, torch.cat(list(norms)).split([*map(len, kinds)]), strict=True):
        squares = torch.where(sizes > 0, own / sizes, 0.0)
        found.append(own + ELSEWHERE * squares.sum() / max(len(squares), 1) * sizes)
    return list(torch.cat(found).split([len(own) for own in norms]))


def chosen_anew(
    energies: LayerEnergies, norms: Sequence[torch.Tensor], selection: Selection
) -> Selection:
    """As many micro-experts of each expert and tier as a selection has, by what they are worth now.

    norms: as `worth_of` takes them.
    """
    before = [*selection.experts, *selection.shared]
    each = worth_of(energies, norms)
    kept = [rank(worth)[: len(own)] for worth, own in zip(each, before, strict=True)]
    number, share = len(selection.experts), _share_kept(energies.per_expert, kept)
    return replace(selection, experts=kept[:number], shared=kept[number:], energy_kept=share)


def norms_of(down: torch.Tensor) -> torch.Tensor:
    """‖w‖² of each row of down, float64 on the CPU."""
    parts = [torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in down.split(4096)]
    return torch.cat(parts).square().cpu()


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
