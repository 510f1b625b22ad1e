"""The first kernel: gate and up of every tier, SiLU, their product, the routing weight."""

# Kernels take values of Triton, which has no types for them.
# mypy: disable-error-code="import-untyped, no-untyped-def"

import triton
import triton.language as tl

from camera_serve.kernels.triton.decode import (
    SLICES_OF,
    decode,
    load_words,
    slices_per_group,
)
from camera_serve.kernels.triton.layout import COLUMN_UNIT
from camera_serve.kernels.triton.routing import alone

_COLUMN_UNIT = tl.constexpr(COLUMN_UNIT)


@triton.jit(do_not_specialize=["side_by_side"])
def gate_up(
    x,
    hidden,
    routing_weights,
    ids,
    order,
    starts,
    offsets,
    tile_list,
    tensors,
    side_by_side,
    width,
    TIERS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DIRECT: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program: ROWS micro-experts of one tier of one expert, for BLOCK slots at a time.

    hidden: `[num_slots, width]`, row by position in `order`, tiers side by side, each from a
    multiple of COLUMN_UNIT on and with zeros up to the next. TIERS: bits and slice length of each
    tier. `side_by_side` programs share an expert's slots, or its tiles when DIRECT, where each
    program has one slot.
    """
    program = tl.program_id(0) // side_by_side
    part = tl.program_id(0) % side_by_side
    lanes = tl.arange(0, BLOCK)
    entry = tile_list + program * 2
    if DIRECT:
        expert, first, last = alone(ids, program, NUM_EXPERTS)
        tile = part
    else:
        expert, tile = tl.load(entry), tl.load(entry + 1)
        first = tl.load(starts + expert) + part * BLOCK
        last = tl.load(starts + expert + 1)
    for start in tl.range(first, last, side_by_side * BLOCK, disable_licm=True):
        _tile(
            x, hidden, routing_weights, order, offsets, tensors, expert, tile, start + lanes, last,
            width, TIERS, TOP_K, NUM_EXPERTS, D_MODEL, GROUP_SIZE, BLOCK, ROWS, STEP, DIRECT, PTX,
        )  # fmt: skip


@triton.jit
def _tile(
    x,
    hidden,
    routing_weights,
    order,
    offsets,
    tensors,
    expert,
    tile,
    positions,
    last,
    width,
    TIERS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DIRECT: tl.constexpr,
    PTX: tl.constexpr,
):
    """One of an expert's tiles for one block of its slots; past the last tile, nothing."""
    inside = positions < last
    slots = positions if DIRECT else tl.load(order + positions, mask=inside, other=0)
    tokens = x + (slots // TOP_K).to(tl.int64)[:, None] * D_MODEL
    column = 0
    for t in tl.static_range(len(TIERS)):
        ends = offsets + t * (NUM_EXPERTS + 1)
        base = tl.load(ends + expert)
        count = (tl.load(ends + expert + 1) - base).to(tl.int32)
        row = tile * ROWS
        if (row >= 0) & (row < count):
            if TIERS[t][0] == 16:
                both = _dense(
                    tokens, inside, tensors[t], base, row, count, BLOCK, ROWS, D_MODEL, STEP
                )
            else:
                total = tl.load(ends + NUM_EXPERTS)
                both = _packed(
                    tokens, inside, tensors[t], base, row, count, total, TIERS[t][0], TIERS[t][1],
                    BLOCK, ROWS, D_MODEL, GROUP_SIZE, PTX,
                )  # fmt: skip
            share = tl.load(routing_weights + slots, mask=inside, other=0).to(tl.float32)
            places = hidden + positions.to(tl.int64)[:, None] * width + column
            _finish(both, share, places, inside, row, count, BLOCK, ROWS)
        tile -= tl.cdiv(count, ROWS)
        column += tl.cdiv(count, _COLUMN_UNIT) * _COLUMN_UNIT


@triton.jit
def _finish(both, share, places, inside, row, count, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Store the activations of a tile, zeros behind an expert's last micro-expert included."""
    gate, up = _apart(both, BLOCK, ROWS)
    out = gate * tl.sigmoid(gate) * up * share[None, :]
    rows = row + tl.arange(0, ROWS)
    padded = tl.cdiv(count, _COLUMN_UNIT) * _COLUMN_UNIT
    held = inside[:, None] & (rows < padded)[None, :]
    tl.store(places + rows[None, :], tl.trans(out).to(places.dtype.element_ty), mask=held)


@triton.jit
def _together(ROWS: tl.constexpr):
    """Of `2 · ROWS` rows of a tile: the micro-expert of each, and whether it is its row of up.

    Rows 8 apart lie in the same thread of the matrix units' layouts: so do then gate and up of one
    micro-expert, and no data moves when they are taken apart.
    """
    tile_rows = tl.arange(0, 2 * ROWS)
    return tile_rows // 16 * 8 + tile_rows % 8, (tile_rows // 8 % 2) == 1


@triton.jit
def _select(is_up, up, gate, ALIGNED: tl.constexpr):
    """Where two matrices begin, by row of a tile."""
    begin = tl.where(is_up, up, gate)
    if ALIGNED:
        # Triton 3.8 would forget it, and read every element by itself, not 16 bytes.
        begin = tl.multiple_of(begin, 16)
    return begin


@triton.jit
def _apart(both, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Gate and up, `[ROWS, BLOCK]` each, of a tile in `_together`'s order."""
    by_eight = tl.reshape(both, (ROWS // 8, 2, 8, BLOCK))
    gate, up = tl.split(tl.permute(by_eight, (0, 2, 3, 1)))
    return tl.reshape(gate, (ROWS, BLOCK)), tl.reshape(up, (ROWS, BLOCK))


@triton.jit
def _dense(
    tokens,
    inside,
    matrices,
    base,
    row,
    count,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D_MODEL: tl.constexpr,
    STEP: tl.constexpr,
):
    """`[2 · ROWS, BLOCK]` products of 16-bit rows of gate and up with the tokens."""
    both = tl.zeros((2 * ROWS, BLOCK), tl.float32)
    which, is_up = _together(ROWS)
    rows = row + which
    first = _select(is_up, matrices[1], matrices[0], D_MODEL % 8 == 0)
    matrix = first + base * D_MODEL + rows * D_MODEL
    steps = tl.arange(0, STEP)
    real = (rows < count)[:, None]
    for k in range(0, D_MODEL, STEP):
        columns = (k + steps)[None, :]
        held, wanted = real, inside[:, None]
        if D_MODEL % STEP != 0:
            held, wanted = held & (columns < D_MODEL), wanted & (columns < D_MODEL)
        tile = tl.load(matrix[:, None] + columns, mask=held, other=0.0)
        x_tile = tl.trans(tl.load(tokens + columns, mask=wanted, other=0.0))
        both = tl.dot(tile, x_tile, both, input_precision="ieee")
    return both


@triton.jit
def _packed(
    tokens,
    inside,
    matrices,
    base,
    row,
    count,
    total,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PTX: tl.constexpr,
):
    """`[2 · ROWS, BLOCK]` products of packed rows of gate and up with the tokens, a span a step."""
    DTYPE: tl.constexpr = tokens.dtype.element_ty
    SLICES: tl.constexpr = SLICES_OF[BITS]
    PER_GRID: tl.constexpr = slices_per_group(GROUP_SIZE, LENGTH, SLICES)
    both = tl.zeros((2 * ROWS, BLOCK), tl.float32)
    which, is_up = _together(ROWS)
    rows = row + which
    real = rows < count
    first = _select(is_up, matrices[1], matrices[0], D_MODEL % 128 == 0)
    matrix = (first + base * (D_MODEL // 32 * BITS))[:, None]
    grids = tl.where(is_up, matrices[3] + base, matrices[2] + base) + rows
    lanes = tl.arange(0, LENGTH if LENGTH > 16 else 16)
    wanted = inside[:, None] & (lanes < LENGTH)[None, :]
    for span in range(D_MODEL // (SLICES * LENGTH)):
        low, high = load_words(
            matrix, rows[:, None], real[:, None], lanes[None, :], span, BITS, LENGTH, D_MODEL
        )
        for j in tl.static_range(SLICES):
            column = (span * SLICES + j) * LENGTH
            if j % PER_GRID == 0:
                grid = tl.load(grids + column // GROUP_SIZE * total, mask=real, other=0)[:, None]
            x_tile = tl.trans(tl.load(tokens + column + lanes[None, :], mask=wanted, other=0.0))
            tile = decode(low, high, grid, j, BITS, DTYPE, PTX)
            both = tl.dot(tile, x_tile, both, input_precision="ieee")
    return both
