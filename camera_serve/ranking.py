"""Energies of one loaded MoE layer, and the micro-experts a tier plan keeps of it."""

from dataclasses import dataclass

import torch

from camera_serve.energy import RoutedExpertsMeter, SharedExpertMeter
from camera_serve.layout import LayerLayout, rank, tier_counts
from camera_serve.recipe import TierPlan
from camera_serve.streaming import ModelStream, StreamedLayer


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

    experts[e], shared[s]: int64 indices into the expert's original d_ff. energy_kept: the kept
    micro-experts' share of the layer's energy.
    """

    layout: LayerLayout
    experts: list[torch.Tensor]
    shared: list[torch.Tensor]
    energy_kept: float


@torch.inference_mode()
def measure(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor, alpha: float
) -> LayerEnergies:
    """Run the calibration tokens through one MoE layer and return its energies (Algorithm 1).

    hidden: `[samples, seq_len, d_model]`, the layer's input. The layer's experts modules are
    replaced while it runs and put back.
    """
    assert loaded.experts is not None
    routed = RoutedExpertsMeter(loaded.experts)
    loaded.use_experts(routed)
    mlp, name = loaded.module.mlp, stream.structure.family.shared_name or ""
    shared = None
    if loaded.shared is not None:
        shared = SharedExpertMeter(loaded.shared, loaded.shared_gate)
        setattr(mlp, name, shared)
    for _ in stream.outputs(layer, loaded, hidden):
        pass
    experts = routed.sums.energies(loaded.experts.down, alpha).cpu()
    shared_energies = torch.empty(0, dtype=torch.float64)
    if shared is not None:
        setattr(mlp, name, loaded.shared)
        shared_energies = shared.sums.energies(loaded.shared.down_proj.weight.T, alpha).cpu()
    return LayerEnergies(
        experts.view(stream.structure.num_experts, -1), shared_energies, routed.sums.tokens.cpu()
    )


def select(energies: LayerEnergies, plan: TierPlan, align: int) -> Selection:
    """The micro-experts a plan keeps of one layer (Algorithm 2, line 9; Algorithm 3, lines 5-8)."""
    per_expert = energies.per_expert
    counts = tier_counts(per_expert, plan, align)
    stored = len(plan.bits)
    num_experts = len(energies.experts)
    layout = LayerLayout(
        experts=tuple(tiers[:stored] for tiers in counts[:num_experts]),
        shared=tuple(tiers[:stored] for tiers in counts[num_experts:]),
    )
    widths = layout.expert_d_ff + layout.shared_d_ff
    kept = [rank(e)[:width] for e, width in zip(per_expert, widths, strict=True)]
    kept_energy = sum(float(e[k].sum()) for e, k in zip(per_expert, kept, strict=True))
    total = sum(float(e.sum()) for e in per_expert)
    share = kept_energy / total if total else 1.0
    return Selection(layout, kept[:num_experts], kept[num_experts:], share)
