"""How originals store their weights: which part of a stored tensor each logical tensor is.

A logical tensor is named as in the family's published checkpoints, one for every expert and
projection; everything above the reader knows these alone. transformers 5 saves, unless told to keep
the original format, its own module names and all experts of a layer in two tensors:
`experts.gate_up_proj [num_experts, 2 * d_ff, d_model]`, gate first, and
`experts.down_proj [num_experts, d_model, d_ff]`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from camera_serve.errors import CheckpointError
from camera_serve.models.structure import MoeStructure

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

_FUSED = re.compile(r"(.+)\.experts\.(gate_up_proj|down_proj)")


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
    fused = _FUSED.fullmatch(name)
    layer = structure.layer_of(fused[1]) if fused else None
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
