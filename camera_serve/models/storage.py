"""How originals store their weights: which part of a stored tensor each logical tensor is.

A logical tensor is named as in the family's published checkpoints, one for every expert and
projection; everything above the reader knows these alone. transformers 5 saves, unless told to keep
the original format, its own module names and all experts of a layer in two tensors:
`experts.gate_up_proj [num_experts, 2 * d_ff, d_model]`, gate first, and
`experts.down_proj [num_experts, d_model, d_ff]`.
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

    An empty `index` is the whole stored tensor.
    """

    name: str
    shape: Shape
    index: Index = ()


def logical_tensors(
    stored: str, shape: Shape, file: Path, structure: MoeStructure
) -> Iterator[LogicalTensor]:
    """What the tensor of this name and shape in `file` holds.

    Raises `CheckpointError` for fused experts whose shape is not the one config.json implies.
    """
    name = structure.to_checkpoint_name(stored)
    fused = _FUSED.fullmatch(structure.to_hf_name(name))
    moe_prefix = structure.to_checkpoint_name(f"{fused[1]}.").removesuffix(".") if fused else ""
    layer = structure.layer_of(moe_prefix)
    if fused is None or layer is None:
        yield LogicalTensor(name, shape)
        return
    d_ff, d_model, both = structure.d_ff, structure.d_model, fused[2] == "gate_up_proj"
    wanted = (structure.num_experts, *((2 * d_ff, d_model) if both else (d_model, d_ff)))
    if shape != wanted:
        raise CheckpointError(
            f"{file}: tensor {stored} has shape {list(shape)}, config.json implies {list(wanted)}"
        )
    for expert in range(structure.num_experts):
        if not both:
            down = f"{structure.expert_prefix(layer, expert, 'down')}.weight"
            yield LogicalTensor(down, (d_model, d_ff), (expert,))
            continue
        gate, up = (f"{structure.expert_prefix(layer, expert, p)}.weight" for p in ("gate", "up"))
        yield LogicalTensor(gate, (d_ff, d_model), (expert, slice(0, d_ff)))
        yield LogicalTensor(up, (d_ff, d_model), (expert, slice(d_ff, 2 * d_ff)))


def as_published(
    tensors: Mapping[str, torch.Tensor], structure: MoeStructure, layer: int
) -> dict[str, torch.Tensor]:
    """The logical tensors of a layer's experts, as the family's checkpoints store them.

    Fused where those have names of their own for fused experts: no program knows single ones then.
    """
    stored, experts = dict(tensors), f"{structure.moe_module(layer)}.experts"
    for part, projections in _FUSED_PARTS.items():
        name = structure.to_checkpoint_name(f"{experts}.{part}")
        if name == f"{structure.moe_prefix(layer)}.experts.{part}":
            continue
        names = (
            [f"{structure.expert_prefix(layer, expert, p)}.weight" for p in projections]
            for expert in range(structure.num_experts)
        )
        stored[name] = torch.stack([torch.cat([stored.pop(n) for n in both]) for both in names])
    return stored
