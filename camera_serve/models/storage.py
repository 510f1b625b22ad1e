"""How originals store their weights: which part of a stored tensor each logical tensor is.

A logical tensor is named as in the family's published checkpoints, one for every expert and
projection; everything above the reader knows these alone. transformers 5 saves, unless told to keep
the original format, its own module names and all experts of a layer in two tensors:
`experts.gate_up_proj [num_experts, 2 * d_ff, d_model]`, gate first, and
`experts.down_proj [num_experts, d_model, d_ff]`. Some families publish these two, or their
transposes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from camera_serve.errors import CheckpointError
from camera_serve.models.structure import MoeStructure, Projection

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

_FUSED = re.compile(r"(.+)\.experts\.(gate_up_proj|down_proj)")
_FUSED_PARTS: dict[str, tuple[Projection, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
}


@dataclass(frozen=True)
class LogicalTensor:
    """`stored[index]`, of shape `shape`, under the name everything above the reader uses.

    An empty `index` is the whole stored tensor. `transposed`: the shape is that of its transpose.
    """

    name: str
    shape: Shape
    index: Index = ()
    transposed: bool = False


@dataclass(frozen=True)
class _Fused:
    """One of the two tensors that hold a layer's experts, `shape` as transformers has it."""

    layer: int
    projections: tuple[Projection, ...]
    shape: tuple[int, int, int]

    @property
    def turned(self) -> tuple[int, int, int]:
        """The shape of its transpose."""
        experts, rows, columns = self.shape
        return experts, columns, rows


def are_transposed(stored: Mapping[str, Shape], structure: MoeStructure) -> bool:
    """Whether fused experts lie transposed, as the shapes of all of them tell that are not square.

    A model where `gate_up_proj` is square has a `down_proj` that is not.
    """
    told = [
        shape == fused.turned
        for name, shape in stored.items()
        if (fused := _fused(name, structure)) and fused.shape != fused.turned
    ]
    return bool(told) and all(told)


def logical_tensors(
    stored: str, shape: Shape, file: Path, structure: MoeStructure, transposed: bool
) -> Iterator[LogicalTensor]:
    """What the tensor of this name and shape in `file` holds.

    transposed: how fused experts lie. Raises `CheckpointError` for fused experts whose shape is not
    the one config.json implies.
    """
    fused = _fused(stored, structure)
    if fused is None:
        yield LogicalTensor(_name(stored, structure), shape)
        return
    wanted = fused.turned if transposed else fused.shape
    if shape != wanted:
        raise CheckpointError(
            f"{file}: tensor {stored} has shape {list(shape)}, config.json implies {list(wanted)}"
        )
    num_experts, all_rows, columns = fused.shape
    rows = all_rows // len(fused.projections)
    for expert in range(num_experts):
        for number, projection in enumerate(fused.projections):
            part = slice(number * rows, (number + 1) * rows)
            index = (expert, slice(None), part) if transposed else (expert, part)
            name = f"{structure.expert_prefix(fused.layer, expert, projection)}.weight"
            yield LogicalTensor(name, (rows, columns), index, transposed)


def as_published(
    tensors: Mapping[str, torch.Tensor], structure: MoeStructure, layer: int
) -> dict[str, torch.Tensor]:
    """The logical tensors of a layer's experts, as the family's checkpoints store them.

    Fused where those have names of their own for fused experts, or transformers loads no others.
    """
    stored, experts = dict(tensors), f"{structure.moe_module(layer)}.experts"
    turned = structure.family.fused_transposed
    for part, projections in _FUSED_PARTS.items():
        name = structure.to_checkpoint_name(f"{experts}.{part}")
        if name == f"{structure.moe_prefix(layer)}.experts.{part}" and not turned:
            continue
        names = (
            [f"{structure.expert_prefix(layer, expert, p)}.weight" for p in projections]
            for expert in range(structure.num_experts)
        )
        whole = torch.stack([torch.cat([stored.pop(n) for n in both]) for both in names])
        stored[name] = whole.mT if turned else whole
    return stored


def _fused(stored: str, structure: MoeStructure) -> _Fused | None:
    match = _FUSED.fullmatch(structure.to_hf_name(_name(stored, structure)))
    moe_prefix = structure.to_checkpoint_name(f"{match[1]}.").removesuffix(".") if match else ""
    layer = structure.layer_of(moe_prefix)
    if match is None or layer is None:
        return None
    num_experts, d_ff, d_model = structure.num_experts, structure.d_ff, structure.d_model
    if match[2] == "down_proj":
        return _Fused(layer, _FUSED_PARTS[match[2]], (num_experts, d_model, d_ff))
    return _Fused(layer, _FUSED_PARTS[match[2]], (num_experts, 2 * d_ff, d_model))


def _name(stored: str, structure: MoeStructure) -> str:
    """The name in the family's published checkpoints."""
    for theirs, ours in structure.family.also_stored:
        stored = stored.replace(theirs, ours)
    return structure.to_checkpoint_name(stored)
