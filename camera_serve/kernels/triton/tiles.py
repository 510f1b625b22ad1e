"""The tile sizes of a call: a small table by slots per expert, and what follows from it."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from camera_serve.kernels.triton.layout import (
    LONGEST_SLICE,
    TritonLayer,
    slice_length,
    slices_of,
)
from camera_serve.kernels.triton.tuned import TABLE


@dataclass(frozen=True)
class Tiles:
    """One row of the table.

    block: slots of one expert that share a program; rows, step: micro-experts and, in 16-bit tiers,
    columns of x that a gate_up program takes and steps by; columns: of a down program, in 16-bit
    tiers; down_step: micro-experts it steps by; programs: of the
    down kernel that fill the GPU: with fewer, experts are split. The rest: warps of a program and
    loads in flight.
    """

    block: int
    rows: int
    step: int
    warps: int
    stages: int
    columns: int
    down_step: int
    down_warps: int
    down_stages: int
    programs: int


def choose(layer: TritonLayer, num_slots: int, x: torch.Tensor) -> Tiles:
    """The row of the table for a layer's kind and the mean number of slots of an expert.

    The next smaller row where a GPU has too little shared memory even with fewer loads in flight,
    and always the smallest in float32, which has no matrix units.
    """
    kind = "packed" if any(tier.bits < 16 for tier in layer.tiers) else "dense"
    per_expert = num_slots / layer.num_experts
    bounds = sorted(TABLE[kind])
    enough = next((i for i, bound in enumerate(bounds) if per_expert <= bound), len(bounds) - 1)
    for bound in reversed(bounds[1 : enough + 1] if x.element_size() == 2 else ()):
        tiles = _fitted(layer, Tiles(**TABLE[kind][bound]), x)
        if tiles:
            return tiles
    smallest = Tiles(**TABLE[kind][bounds[0]])
    return _fitted(layer, smallest, x) or replace(smallest, stages=1, down_stages=1)


def _fitted(layer: TritonLayer, tiles: Tiles, x: torch.Tensor) -> Tiles | None:
    """With as many loads in flight as shared memory holds; None where not even two fit."""
    if not x.is_cuda:
        return tiles
    size, room = x.element_size(), _shared_memory(x.device)
    step = (2 * tiles.rows + tiles.block) * tiles.step * size
    if any(tier.bits < 16 for tier in layer.tiers):
        span = min(8 * LONGEST_SLICE, layer.d_model)
        # Three bits in two planes, and a grid for each group of at least 32.
        step = max(step, 2 * tiles.rows * (span * 3 // 8 + span // 8) + tiles.block * span * size)
    down_step = (tiles.columns + tiles.block) * tiles.down_step * size
    stages, down_stages = room // step, room // down_step
    if min(stages, down_stages) < 2:
        return None
    return replace(
        tiles,
        stages=min(tiles.stages, stages),
        down_stages=min(tiles.down_stages, down_stages),
    )


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a block may have, less what kernels need besides their tiles."""
    # torch's type stubs lack the attribute.
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 2048


def most_tiles(layer: TritonLayer, rows: int) -> int:
    """Most gate_up tiles of any one expert, all tiers together; at least one."""
    return (layer.width + len(layer.tiers) * (rows - 1)) // rows


def side_by_side(layer: TritonLayer, tiles: Tiles, num_tokens: int, num_slots: int) -> int:
    """Programs that share an expert's slots: enough for twice the mean number, one by one beyond.

    An expert has at most one slot of every token.
    """
    mean = num_slots / layer.num_experts
    return max(1, min(-(-num_tokens // tiles.block), round(2 * mean / tiles.block)))


def tier_shapes(layer: TritonLayer, columns: int) -> tuple[tuple[int, int, int, int], ...]:
    """Bits, slice length, columns of a down program and programs that cover d_model, by tier."""
    shapes = []
    for tier in layer.tiers:
        length = 0
        if tier.bits < 16:
            length = slice_length(tier.bits, layer.d_model, layer.group_size)
            columns = slices_of(tier.bits) * length
        shapes.append((tier.bits, length, columns, -(-layer.d_model // columns)))
    return tuple(shapes)


def split_rows(layer: TritonLayer, tiles: Tiles, active: int, units: int) -> int:
    """Micro-experts of a split, a multiple of the step: all of them where programs are plenty.

    active: blocks of slots that will be at work, of all experts; units: programs of one of them
    without splitting.
    """
    wanted = max(1, tiles.programs // max(1, active * units))
    steps = -(-layer.most_rows // tiles.down_step)
    return max(1, -(-steps // wanted)) * tiles.down_step
