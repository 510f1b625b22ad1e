"""The tile sizes of a call: a small table by slots per expert, and what follows from it."""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch

from camera_serve.kernels.triton.layout import (
    LONGEST_SLICE,
    TritonLayer,
    slice_length,
    slices_of,
)
from camera_serve.kernels.triton.tuned import TABLES

_STEPS_TO_START = 3
"""Steps that a program could have taken while it waits for its first weights."""

Bundles = tuple[tuple[int, int, int, int, int, int], ...]
"""What `bundles` gives, of numbers alone, as a kernel is compiled for it."""


@dataclass(frozen=True)
class Tiles:
    """One row of the table.

    block: slots of one expert that share a program; rows, step: micro-experts and, in 16-bit tiers,
    columns of x that a gate_up program takes and steps by; columns: of a down program, in 16-bit
    tiers; down_parts: programs that share a span's columns in packed ones; down_step: micro-experts
    they step by; programs: of the down kernel that run at once on a multiprocessor. The rest: warps
    of a program, loads in flight, and most registers of a thread (255 is all there are).
    """

    block: int
    rows: int
    step: int
    warps: int
    stages: int
    registers: int
    columns: int
    down_parts: int
    down_step: int
    down_warps: int
    down_stages: int
    down_registers: int
    programs: int


def choose(layer: TritonLayer, num_slots: int, x: torch.Tensor) -> Tiles:
    """The row of the table for a layer's kind and the mean number of slots of an expert.

    The next smaller row where a GPU has too little shared memory even with fewer loads in flight,
    and always the smallest in float32, which has no matrix units.
    """
    kind = "packed" if any(tier.bits < 16 for tier in layer.tiers) else "dense"
    table = TABLES[matrix_unit(x.device)][kind]
    per_expert = num_slots / layer.num_experts
    bounds = sorted(table)
    enough = next((i for i, bound in enumerate(bounds) if per_expert <= bound), len(bounds) - 1)
    for bound in reversed(bounds[1 : enough + 1] if x.element_size() == 2 else ()):
        tiles = _fitted(layer, Tiles(**table[bound]), x)
        if tiles:
            return tiles
    smallest = Tiles(**table[bounds[0]])
    return _fitted(layer, smallest, x) or replace(smallest, stages=1, down_stages=1)


@cache
def matrix_unit(device: torch.device) -> str:
    """The instruction Triton multiplies tiles by there, which tile sizes depend on most.

    With `mma.sync` (Ampere, Ada, small Blackwell cards) all operands are in registers, `wgmma`
    (Hopper) reads tokens from shared memory, and `tcgen05` (large Blackwell cards) adds up in a
    memory of its own, of 512 columns. Without a GPU, Hopper's.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(major, "mma.sync")


def _fitted(layer: TritonLayer, tiles: Tiles, x: torch.Tensor) -> Tiles | None:
    """With as many loads in flight as shared memory holds; None where not even two fit."""
    if not x.is_cuda:
        return tiles
    size, room = x.element_size(), _shared_memory(x.device)
    step = (2 * tiles.rows + tiles.block) * tiles.step * size
    if any(tier.bits < 16 for tier in layer.tiers):
        span = min(8 * LONGEST_SLICE, layer.d_model)
        # Three bits in two planes, and a grid for each group.
        row = span * 3 // 8 + 4 * -(-span // layer.group_size)
        step = max(step, 2 * tiles.rows * row + tiles.block * span * size)
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

    Usually an expert has at most one slot of a token.
    """
    mean = num_slots / layer.num_experts
    return max(1, min(-(-num_tokens // tiles.block), round(2 * mean / tiles.block)))


def lengths(layer: TritonLayer) -> tuple[int, ...]:
    """Slice length of each tier; 0 where weights are not packed."""
    return tuple(
        slice_length(tier.bits, layer.d_model, layer.group_size) if tier.bits < 16 else 0
        for tier in layer.tiers
    )


def bundles(layer: TritonLayer, tiles: Tiles) -> Bundles:
    """Neighbouring tiers whose down programs take the same columns: one program adds them all up.

    For each its first tier, the one behind its last, slices and their length, which together are
    the columns of a span, programs that cover d_model, and how many of them share a span.
    """
    shapes = [
        (slices_of(tier.bits), length) if length else (1, tiles.columns)
        for tier, length in zip(layer.tiers, lengths(layer), strict=True)
    ]
    found = []
    first = 0
    for shape, alike in groupby(shapes):
        stop = first + len(list(alike))
        parts = min(tiles.down_parts, shape[0])
        programs = parts * -(-layer.d_model // math.prod(shape))
        found.append((first, stop, *shape, programs, parts))
        first = stop
    return tuple(found)


def split_rows(
    layer: TritonLayer,
    tiles: Tiles,
    active: int,
    units: int,
    slots_per_block: float,
    device: torch.device,
) -> int:
    """Micro-experts of a split, a multiple of the step: all of them where programs are plenty.

    active: blocks of slots that will be at work, of all experts; units: programs of one of them
    without splitting; slots_per_block: on average.
    """
    bits = sum(tier.bits for tier in layer.tiers) / len(layer.tiers)
    # A program's sums are written and read again, which takes as long as some steps' weights.
    sums = min(slots_per_block, tiles.block) * 4 * 8 / (tiles.down_step * bits)
    steps = -(-layer.most_rows // tiles.down_step)
    at_once = tiles.programs * _multiprocessors(device)
    return _steps_of_a_split(steps, active * units, at_once, round(sums)) * tiles.down_step


@cache
def _multiprocessors(device: torch.device) -> int:
    """Without a GPU, those of an H200."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _steps_of_a_split(steps: int, programs: int, at_once: int, steps_of_sums: int) -> int:
    """What ends first: rounds of programs, each of its steps and of what it costs besides."""

    def duration(splits: int) -> int:
        rounds = -(-programs * splits // at_once)
        return rounds * (-(-steps // splits) + _STEPS_TO_START + steps_of_sums)

    return -(-steps // min(range(1, steps + 1), key=duration))
