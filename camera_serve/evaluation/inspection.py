"""What a checkpoint holds, expert by expert, from its config and headers alone."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camera_serve.checkpoint.format import DENSE_TIERS, Tiers, dense_layout, expert_shapes
from camera_serve.checkpoint.reader import Checkpoint, read_report
from camera_serve.checkpoint.report import REPORT_FILE, CompressionReport, StoredOriginal
from camera_serve.errors import CheckpointError
from camera_serve.models.structure import PROJECTIONS, MoeStructure
from camera_serve.ragged.layout import LayerLayout


@dataclass(frozen=True)
class LayerInspection:
    """One MoE layer: the d_ff each expert keeps, its bytes, and the calibration tokens it saw.

    `tokens_per_expert` is None when no report lies beside the checkpoint. `expert_bits`: what each
    expert takes per weight of the original, the shared one last, scales and zeros counted;
    `micro_experts_at`: how many are stored at each bit-width, 0 for the removed ones.
    """

    layer: int
    expert_d_ff: tuple[int, ...]
    shared_d_ff: tuple[int, ...]
    original_micro_experts: int
    expert_bytes: int
    d_model: int
    tokens_per_expert: tuple[int, ...] | None
    expert_bits: tuple[float, ...] = ()
    micro_experts_at: Mapping[int, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight that is left, scales and zeros counted; 0 when none is left."""
        weights = self.micro_experts * len(PROJECTIONS) * self.d_model
        return 8 * self.expert_bytes / weights if weights else 0.0

    @property
    def bits_per_original_weight(self) -> float:
        """Stored bits per weight that the original has, scales and zeros counted."""
        weights = self.original_micro_experts * len(PROJECTIONS) * self.d_model
        return 8 * self.expert_bytes / weights

    @property
    def expert_bits_range(self) -> tuple[float, float, float]:
        """Least, median and most of `expert_bits`, of the routed experts."""
        routed = self.expert_bits[: len(self.expert_d_ff)]
        return min(routed), statistics.median(routed), max(routed)

    @property
    def micro_experts(self) -> int:
        """Micro-experts the layer keeps, shared experts included."""
        return sum(self.expert_d_ff) + sum(self.shared_d_ff)

    @property
    def removed_share(self) -> float:
        """λ of this layer: the share of its micro-experts that is gone."""
        return 1 - self.micro_experts / self.original_micro_experts

    @property
    def width_range(self) -> tuple[int, float, int]:
        """Smallest, median and largest d_ff of the routed experts."""
        return (
            min(self.expert_d_ff),
            statistics.median(self.expert_d_ff),
            max(self.expert_d_ff),
        )

    def least_seen(self, count: int) -> tuple[tuple[int, int], ...]:
        """The `count` routed experts with the fewest calibration tokens, as (expert, tokens)."""
        seen = enumerate(self.tokens_per_expert or ())
        return tuple(sorted(seen, key=lambda pair: (pair[1], pair[0]))[:count])

    def to_json(self) -> dict[str, Any]:
        """The layer as plain JSON values."""
        low, median, high = self.width_range
        return {
            "layer": self.layer,
            "expert_d_ff": list(self.expert_d_ff),
            "shared_d_ff": list(self.shared_d_ff),
            "expert_d_ff_min_median_max": [low, median, high],
            "micro_experts": self.micro_experts,
            "original_micro_experts": self.original_micro_experts,
            "removed_share": self.removed_share,
            "expert_bytes": self.expert_bytes,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_original_weight": self.bits_per_original_weight,
            "expert_bits_per_original_weight": list(self.expert_bits),
            "micro_experts_at_bits": {str(b): count for b, count in self.micro_experts_at.items()},
            "tokens_per_expert": self.tokens_per_expert and list(self.tokens_per_expert),
        }


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint; `plan` is None for a dense one.

    Bytes are those of decoded weights; `stored` tells of an original that is published quantized.
    """

    path: Path
    model_type: str
    plan: str | None
    num_layers: int
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    total_bytes: int
    expert_bytes: int
    num_parameters: int
    layers: tuple[LayerInspection, ...]
    stored: StoredOriginal | None = None

    @property
    def removed_share(self) -> float:
        """λ over all MoE layers: the share of micro-experts that is gone."""
        original = sum(layer.original_micro_experts for layer in self.layers)
        return 1 - sum(layer.micro_experts for layer in self.layers) / original

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per expert weight that is left, scales and zeros counted."""
        left = sum(layer.micro_experts for layer in self.layers)
        return 8 * self.expert_bytes / (left * len(PROJECTIONS) * self.d_model) if left else 0.0

    @property
    def removed_parameter_share(self) -> float:
        """The share of all the model's parameters that is gone."""
        gone = sum(layer.original_micro_experts - layer.micro_experts for layer in self.layers)
        removed = gone * len(PROJECTIONS) * self.d_model
        return removed / (self.num_parameters + removed)

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as plain JSON values, layers included."""
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "plan": self.plan,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "total_bytes": self.total_bytes,
            "expert_bytes": self.expert_bytes,
            "bits_per_weight": self.bits_per_weight,
            "num_parameters": self.num_parameters,
            "removed_share": self.removed_share,
            "removed_parameter_share": self.removed_parameter_share,
            "layers": [layer.to_json() for layer in self.layers],
            "stored": self.stored and self.stored.model_dump(mode="json"),
        }


def inspect(path: Path) -> Inspection:
    """Describe a checkpoint folder, compressed or dense, without reading its weights.

    Raises `CheckpointError` when tensors contradict the config, `UnsupportedModelError` for a model
    without experts or of an unknown family.
    """
    checkpoint = Checkpoint.open(path)
    structure = checkpoint.structure
    report = report_of(checkpoint)
    tokens = {layer.layer: layer.tokens_per_expert for layer in report.layers} if report else {}
    return Inspection(
        path=path,
        model_type=structure.model_type,
        plan=checkpoint.quantization.recipe.goal if checkpoint.quantization else None,
        num_layers=structure.num_layers,
        num_experts=structure.num_experts,
        top_k=structure.top_k,
        d_model=structure.d_model,
        d_ff=structure.d_ff,
        total_bytes=checkpoint.total_bytes,
        expert_bytes=checkpoint.expert_bytes,
        num_parameters=_num_parameters(checkpoint),
        layers=tuple(
            _inspect_layer(checkpoint, layer, tokens.get(structure.moe_prefix(layer)))
            for layer in structure.moe_layers
        ),
        stored=checkpoint.stored,
    )


def _num_parameters(checkpoint: Checkpoint) -> int:
    """Weights the model has left, packed ones counted one by one."""
    structure = checkpoint.structure
    others = checkpoint.entries.keys() - checkpoint.expert_names
    left = sum(
        sum(layout.expert_d_ff) + sum(layout.shared_d_ff)
        for layer in structure.moe_layers
        for layout in [_layout(checkpoint, layer)]
    )
    experts = left * len(PROJECTIONS) * structure.d_model
    return experts + sum(math.prod(checkpoint.entries[name].shape) for name in others)


def _layout(checkpoint: Checkpoint, layer: int) -> LayerLayout:
    structure, quantization = checkpoint.structure, checkpoint.quantization
    prefix = structure.moe_prefix(layer)
    return quantization.layout(prefix) if quantization else dense_layout(structure)


def _inspect_layer(
    checkpoint: Checkpoint, layer: int, tokens: tuple[int, ...] | None
) -> LayerInspection:
    structure, quantization = checkpoint.structure, checkpoint.quantization
    layout = _layout(checkpoint, layer)
    tiers = quantization.tiers if quantization else DENSE_TIERS
    names = expert_shapes(structure, layer, layout, tiers)
    return LayerInspection(
        layer=layer,
        expert_d_ff=layout.expert_d_ff,
        shared_d_ff=layout.shared_d_ff,
        original_micro_experts=structure.micro_experts_per_layer,
        expert_bytes=sum(checkpoint.entries[name].num_bytes for name in names),
        d_model=structure.d_model,
        tokens_per_expert=tokens,
        expert_bits=_expert_bits(checkpoint, layer, names),
        micro_experts_at=_micro_experts_at(structure, layout, tiers),
    )


def _expert_bits(checkpoint: Checkpoint, layer: int, names: Iterable[str]) -> tuple[float, ...]:
    """Stored bits per weight of the original, expert by expert, the shared one last."""
    structure = checkpoint.structure
    owners = {
        structure.expert_prefix(layer, expert, projection): expert
        for expert in range(structure.num_experts)
        for projection in PROJECTIONS
    }
    widths = [structure.d_ff] * structure.num_experts
    if structure.shared_d_ff:
        owners |= dict.fromkeys((structure.shared_prefix(layer, p) for p in PROJECTIONS), -1)
        widths.append(structure.shared_d_ff)
    taken = [0] * len(widths)
    for name in names:
        taken[owners[name.rpartition(".")[0]]] += checkpoint.entries[name].num_bytes
    weights = [width * len(PROJECTIONS) * structure.d_model for width in widths]
    return tuple(8 * size / count for size, count in zip(taken, weights, strict=True))


def _micro_experts_at(structure: MoeStructure, layout: LayerLayout, tiers: Tiers) -> dict[int, int]:
    counts = [sum(tier) for tier in zip(*layout.experts, *layout.shared, strict=True)]
    removed = structure.micro_experts_per_layer - sum(counts)
    return dict(zip(tiers.bits, counts, strict=True)) | {0: removed}


def report_of(checkpoint: Checkpoint) -> CompressionReport | None:
    """The report beside a checkpoint, if there is one.

    Raises `CheckpointError` where it tells of another compression than config.json.
    """
    report, structure = read_report(checkpoint.path), checkpoint.structure
    if report is None:
        return None
    if checkpoint.quantization and report.recipe != checkpoint.quantization.recipe:
        raise CheckpointError(_of_another("recipe", checkpoint.path))
    if report.expert_bytes_after != checkpoint.expert_bytes:
        raise CheckpointError(_of_another("number of expert bytes", checkpoint.path))
    if report.total_bytes_after != checkpoint.total_bytes:
        raise CheckpointError(_of_another("number of bytes", checkpoint.path))
    layouts = {structure.moe_prefix(n): _layout(checkpoint, n) for n in structure.moe_layers}
    if sorted(layer.layer for layer in report.layers) != sorted(layouts):
        raise CheckpointError(_of_another("list of layers", checkpoint.path))
    for layer in report.layers:
        wanted = layouts[layer.layer]
        if (layer.expert_d_ff, layer.shared_d_ff) != (wanted.expert_d_ff, wanted.shared_d_ff):
            raise CheckpointError(_of_another(f"d_ff of {layer.layer}", checkpoint.path))
        if len(layer.tokens_per_expert) != structure.num_experts:
            raise CheckpointError(
                _of_another(f"number of experts in {layer.layer}", checkpoint.path)
            )
    return report


def _of_another(what: str, folder: Path) -> str:
    return (
        f"{folder / REPORT_FILE} has another {what} than config.json: one of them was edited, or "
        "is another checkpoint's; copy both files again, or compress again"
    )
