"""Checkpoint format 1: what `quantization_config` says, and every tensor shape that follows.

`config.json` alone fixes every shape, so a loader can allocate before it reads, and a checkpoint
that lies is refused before a kernel sees it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from transformers import PreTrainedConfig

from camera_serve.errors import CheckpointError
from camera_serve.models import MoeStructure
from camera_serve.models.building import build_on_meta
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.ragged.layout import LayerLayout
from camera_serve.ragged.packing import CODES_PER_UNIT, words_per_row
from camera_serve.recipe import SERVED_BITS, Recipe, Settings, describe_errors

FORMAT: Literal[1] = 1
GROUP_SIZE = 128

MARKER_FILE = "hf_quant_config.json"
MARKER = {"quant_method": "camera"}
"""vLLM reads this file only when config.json has no `quantization_config`. A checkpoint whose
config.json was replaced by the dense model's then meets our plugin, which refuses it, and not
vLLM's dense loader, which takes narrower experts without a word."""

LOST = (
    "config.json of this CAMERA checkpoint has lost its quantization_config, so the widths of its "
    "experts are unknown: restore config.json from the original, or compress the model again"
)
"""What is said where the marker is there and the layout is not."""

NO_PLAIN_TRANSFORMERS = (
    "none, as this is a CAMERA checkpoint: `pip install camera-serve`, then "
    "`import camera_serve.hf` before from_pretrained (or run a program as "
    "`python -m camera_serve.hf MODULE`)"
)
"""What config.json says under `transformers_weights`: the one file that transformers, from 4.53 on,
loads weights from. It refuses a name that does not end in `.safetensors`, and shows it. Without one
it skips a `quant_method` it does not know, and fills packed experts with random numbers. vLLM does
not read it."""

Shapes = dict[str, tuple[int, ...]]

Part = Literal["weight", "qweight", "scales", "zeros"]
PARTS: tuple[Part, ...] = ("weight", "qweight", "scales", "zeros")
"""The tensors of one projection of one expert: 16-bit rows, and packed ones with their grids."""


@dataclass(frozen=True)
class Tiers:
    """The stored bit-widths of a checkpoint, falling, and the weights that share a scale."""

    bits: tuple[int, ...]
    group_size: int = GROUP_SIZE


DENSE_TIERS = Tiers((16,))


class LayerCounts(Settings):
    """`LayerLayout` as JSON: `{"experts": [[n16], …], "shared": [[n16]]}`."""

    experts: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def layout(self) -> LayerLayout:
        """The counts as the core uses them."""
        return LayerLayout(experts=self.experts, shared=self.shared)


class OutsideExperts(Settings):
    """Linear layers outside the experts that are stored in FP8, as the original has them.

    weight_block_size: rows and columns that share a scale, in `weight_scale_inv`; None for one
    `weight_scale` per matrix. modules: their checkpoint names (`model.layers.3.self_attn.o_proj`).
    """

    quant_method: Literal["fp8"] = "fp8"
    weight_block_size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def scale(self) -> str:
        """What the name of a weight's scales adds to the weight's."""
        return "_scale_inv" if self.weight_block_size else "_scale"


class CameraQuantizationConfig(Settings):
    """The `quantization_config` of a compressed checkpoint."""

    quant_method: Literal["camera"] = "camera"
    format: Literal[1] = FORMAT
    group_size: Annotated[int, Field(gt=0)] = GROUP_SIZE
    bits: tuple[int, ...]
    layers: dict[str, LayerCounts]
    recipe: Recipe
    outside_experts: OutsideExperts | None = None

    @model_validator(mode="after")
    def _bits_are_served(self) -> Self:
        if not self.bits or any(b not in SERVED_BITS or b == 0 for b in self.bits):
            raise ValueError(f"bits {list(self.bits)} cannot be served by this version")
        if list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(f"bits must fall from tier to tier, found {list(self.bits)}")
        return self

    @property
    def tiers(self) -> Tiers:
        """Bit-widths and group size, which every layer shares."""
        return Tiers(self.bits, self.group_size)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Validate the JSON object; raises `CheckpointError` that names the key at fault."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise CheckpointError(
                f"quantization_config is not CAMERA format {FORMAT}: {describe_errors(error)}"
            ) from error

    def config_entries(self) -> dict[str, Any]:
        """What config.json of a compressed checkpoint says beside the original's settings."""
        return {
            "transformers_weights": NO_PLAIN_TRANSFORMERS,
            "quantization_config": self.model_dump(mode="json", exclude_none=True),
        }

    def layout(self, moe_prefix: str) -> LayerLayout:
        """The layout of one MoE layer, by checkpoint prefix (`model.layers.3.mlp`)."""
        if moe_prefix not in self.layers:
            raise CheckpointError(
                f"quantization_config has no layer {moe_prefix!r}; it has {len(self.layers)} layers"
            )
        return self.layers[moe_prefix].layout

    def check(self, structure: MoeStructure) -> None:
        """Refuse counts that do not fit the model: layers, experts, tiers, widths."""
        wanted = {structure.moe_prefix(layer) for layer in structure.moe_layers}
        if missing := sorted(wanted - self.layers.keys()):
            raise CheckpointError(
                f"quantization_config lists {len(self.layers)} layers, the model has {len(wanted)} "
                f"MoE layers: {missing[0]} is missing"
            )
        if extra := sorted(self.layers.keys() - wanted):
            raise CheckpointError(
                f"quantization_config lists {extra[0]}, which is not a MoE layer of this model"
            )
        check_groups(structure.d_model, self.group_size, self.bits)
        num_shared = 1 if structure.shared_d_ff else 0
        for name, counts in self.layers.items():
            _check_counts(
                name, "experts", counts.experts, structure.num_experts, structure.d_ff, self.bits
            )
            _check_counts(
                name, "shared", counts.shared, num_shared, structure.shared_d_ff, self.bits
            )


def check_groups(d_model: int, group_size: int, bits: Sequence[int]) -> None:
    """Refuse packed tiers whose groups are not whole packing units, or do not fill a row."""
    if all(b == 16 for b in bits):
        return
    if d_model % CODES_PER_UNIT:
        raise CheckpointError(
            f"d_model {d_model} is no multiple of {CODES_PER_UNIT}, so micro-experts cannot be "
            "packed: use a plan of 16 and 0 bits"
        )
    if group_size < 1 or group_size % CODES_PER_UNIT or d_model % group_size:
        sizes = range(CODES_PER_UNIT, 2 * GROUP_SIZE + 1, CODES_PER_UNIT)
        usable = ", ".join(str(size) for size in sizes if d_model % size == 0)
        raise CheckpointError(
            f"group size {group_size} must be a multiple of {CODES_PER_UNIT} that divides d_model "
            f"{d_model}: {usable}"
        )


def _check_counts(
    layer: str,
    kind: str,
    counts: tuple[tuple[int, ...], ...],
    num_experts: int,
    d_ff: int,
    bits: tuple[int, ...],
) -> None:
    where = f"quantization_config layer {layer}"
    if len(counts) != num_experts:
        raise CheckpointError(f"{where} counts {len(counts)} {kind}, the model has {num_experts}")
    for expert, tiers in enumerate(counts):
        if len(tiers) != len(bits):
            raise CheckpointError(
                f"{where}, {kind}[{expert}] has {len(tiers)} tiers, wanted {len(bits)} "
                f"({list(bits)} bits)"
            )
        if min(tiers) < 0 or sum(tiers) > d_ff:
            raise CheckpointError(
                f"{where}, {kind}[{expert}] counts {list(tiers)} micro-experts: wanted none below "
                f"0 and at most {d_ff} in all"
            )


def expert_shapes(structure: MoeStructure, layer: int, layout: LayerLayout, tiers: Tiers) -> Shapes:
    """Every expert tensor of one MoE layer, shared experts included; width 0 means absent."""
    shapes: Shapes = {}
    for projection in PROJECTIONS:
        for expert, counts in enumerate(layout.experts):
            prefix = structure.expert_prefix(layer, expert, projection)
            parts = part_shapes(projection, structure.d_model, counts, tiers)
            shapes |= {f"{prefix}.{part}": shape for part, shape in parts.items()}
        for counts in layout.shared:
            prefix = structure.shared_prefix(layer, projection)
            parts = part_shapes(projection, structure.d_model, counts, tiers)
            shapes |= {f"{prefix}.{part}": shape for part, shape in parts.items()}
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def dense_layout(structure: MoeStructure) -> LayerLayout:
    """The layout of an uncompressed layer: every expert at its original d_ff, one tier."""
    shared = ((structure.shared_d_ff,),) if structure.shared_d_ff else ()
    return LayerLayout(experts=((structure.d_ff,),) * structure.num_experts, shared=shared)


def checkpoint_shapes(
    config: PreTrainedConfig,
    structure: MoeStructure,
    quantization: CameraQuantizationConfig | None,
) -> Shapes:
    """Every tensor a checkpoint must hold, by name; `quantization` None means the dense model.

    The names outside the experts come from transformers' own model, built on the meta device;
    raises `CheckpointError` for a config that it cannot be built from.
    """
    model = build_on_meta(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    experts, elsewhere = structure.expert_modules(), structure.family.elsewhere
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        on_disk = structure.to_checkpoint_name(name)
        compared = name not in tied and not name.startswith(experts)
        if compared and not on_disk.startswith(elsewhere):
            shapes[on_disk] = tuple(tensor.shape)
    for layer in structure.moe_layers:
        prefix = structure.moe_prefix(layer)
        layout = quantization.layout(prefix) if quantization else dense_layout(structure)
        tiers = quantization.tiers if quantization else DENSE_TIERS
        shapes |= expert_shapes(structure, layer, layout, tiers)
    return shapes


def part_shapes(
    projection: Projection, d_model: int, counts: Sequence[int], tiers: Tiers
) -> dict[Part, tuple[int, ...]]:
    """The tensors of one projection of one expert, from its micro-experts in each tier."""
    plain = sum(count for count, bits in zip(counts, tiers.bits, strict=True) if bits == 16)
    packed = {b: count for count, b in zip(counts, tiers.bits, strict=True) if b < 16}
    words = sum(count * words_per_row(d_model, bits) for bits, count in packed.items())
    groups = (sum(packed.values()), d_model // tiers.group_size)
    return {
        "weight": (d_model, plain) if projection == "down" else (plain, d_model),
        "qweight": (words,),
        "scales": groups,
        "zeros": groups,
    }
