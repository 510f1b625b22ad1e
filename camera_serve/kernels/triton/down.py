"""The second kernel: down of every tier, as partial sums; and the third, which adds them up."""

# Kernels take values of Triton, which has no types for them.
# mypy: disable-error-code="import-untyped, no-untyped-def, assignment"

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


@triton.jit(do_not_specialize=["splits", "side_by_side"])
def down(
    hidden,
    partial,
    ids,
    order,
    starts,
    offsets,
    tensors,
    splits,
    split_rows,
    side_by_side,
    width,
    TIERS: tl.constexpr,
    UNITS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    DIRECT: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program: some columns from one split of one tier of one expert, BLOCK slots at a time.

    A split is `split_rows` micro-experts of an expert. partial: `[num_slots, num_tiers, splits,
    d_model]`; splits without micro-experts are not written. TIERS: bits, slice length, columns of a
    program and programs that cover d_model, for each tier. UNITS: the latter's sum. `side_by_side`
    programs share an expert's slots; when DIRECT each has one slot.
    """
    program = tl.program_id(0) // side_by_side
    work = program // (UNITS * splits)
    unit = program % (UNITS * splits)
    if DIRECT:
        expert, first, last = alone(ids, work, NUM_EXPERTS)
    else:
        expert = work
        first = tl.load(starts + expert) + tl.program_id(0) % side_by_side * BLOCK
        last = tl.load(starts + expert + 1)
    lanes = tl.arange(0, BLOCK)
    for begin in tl.range(first, last, side_by_side * BLOCK, disable_licm=True):
        positions = begin + lanes
        inside = positions < last
        slots = positions
        if not DIRECT:
            slots = tl.load(order + positions, mask=inside, other=0)
        rest = unit
        column = 0
        for t in tl.static_range(len(TIERS)):
            ends = offsets + t * (NUM_EXPERTS + 1)
            base = tl.load(ends + expert)
            count = (tl.load(ends + expert + 1) - base).to(tl.int32)
            pieces = TIERS[t][3]
            start = rest // pieces * split_rows
            if (rest >= 0) & (rest < pieces * splits) & (start < count):
                activations = hidden + positions.to(tl.int64)[:, None] * width + column
                share = (slots * len(TIERS) + t).to(tl.int64) * splits + rest // pieces
                out = partial + share[:, None] * D_MODEL
                stop = tl.minimum(start + split_rows, count)
                if TIERS[t][0] == 16:
                    _dense(
                        activations, out, inside, tensors[t], base, start, stop, rest % pieces,
                        TIERS[t][2], BLOCK, D_MODEL, STEP,
                    )  # fmt: skip
                else:
                    total = tl.load(ends + NUM_EXPERTS)
                    _packed(
                        activations, out, inside, tensors[t], base, total, start, stop,
                        rest % pieces, TIERS[t][0], TIERS[t][1], BLOCK, D_MODEL, GROUP_SIZE,
                        STEP, PTX,
                    )  # fmt: skip
            rest -= pieces * splits
            column += tl.cdiv(count, _COLUMN_UNIT) * _COLUMN_UNIT


@triton.jit
def _dense(
    activations,
    out,
    inside,
    matrices,
    base,
    start,
    stop,
    piece,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    D_MODEL: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store `[BLOCK, COLUMNS]`: activations times 16-bit rows."""
    matrix = matrices[0] + base * D_MODEL
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)
    existing = (columns < D_MODEL)[None, :]
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for row in range(start, stop, STEP):
        rows = row + tl.arange(0, STEP)
        held = (rows < stop)[:, None]
        if D_MODEL % COLUMNS != 0:
            held = held & existing
        tile = tl.load(matrix + rows[:, None] * D_MODEL + columns[None, :], mask=held, other=0.0)
        active = _activations(activations, inside, rows, stop)
        total = tl.dot(tl.trans(tile), active, total, input_precision="ieee")
    wanted = inside[:, None] & existing
    tl.store(out + columns[None, :], tl.trans(total).to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _packed(
    activations,
    out,
    inside,
    matrices,
    base,
    total,
    start,
    stop,
    span,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    PTX: tl.constexpr,
):
    """Store `[BLOCK, SLICES · LENGTH]`: activations times packed rows, the columns of one span."""
    DTYPE: tl.constexpr = activations.dtype.element_ty
    SLICES: tl.constexpr = SLICES_OF[BITS]
    PER_GRID: tl.constexpr = slices_per_group(GROUP_SIZE, LENGTH, SLICES)
    matrix = matrices[0] + base * (D_MODEL // 32 * BITS)
    lanes = tl.arange(0, LENGTH if LENGTH > 16 else 16)
    sums = (tl.zeros((lanes.shape[0], BLOCK), tl.float32),) * SLICES
    for row in range(start, stop, STEP):
        rows = row + tl.arange(0, STEP)
        real = rows < stop
        low, high = load_words(
            matrix, rows[None, :], real[None, :], lanes[:, None], span, BITS, LENGTH, D_MODEL
        )
        active = _activations(activations, inside, rows, stop)
        added = ()
        for j in tl.static_range(SLICES):
            if j % PER_GRID == 0:
                at = base + (span * SLICES + j) * LENGTH // GROUP_SIZE * total
                grid = tl.load(matrices[1] + at + rows, mask=real, other=0)[None, :]
            tile = decode(low, high, grid, j, BITS, DTYPE, PTX)
            added += (tl.dot(tile, active, sums[j], input_precision="ieee"),)
        sums = added
    wanted = inside[:, None] & (lanes < LENGTH)[None, :]
    for j in tl.static_range(SLICES):
        columns = (span * SLICES + j) * LENGTH + lanes
        tl.store(out + columns[None, :], tl.trans(sums[j]).to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _activations(activations, inside, rows, stop):
    """`[rows, tokens]`: read up to the zeros that end a tier, so that reads are 16 bytes wide."""
    padded = tl.cdiv(stop, _COLUMN_UNIT) * _COLUMN_UNIT
    held = inside[:, None] & (rows < padded)[None, :]
    return tl.trans(tl.load(activations + rows[None, :], mask=held, other=0.0))


@triton.jit(do_not_specialize=["splits"])
def add_up(
    partial,
    out,
    ids,
    offsets,
    splits,
    split_rows,
    NUM_TIERS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program: COLUMNS of one token's output, its partial sums added in float32, in order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    existing = (columns < D_MODEL)[None, :]
    shares = TOP_K * NUM_TIERS * splits
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, shares, AT_ONCE):
        share = start + tl.arange(0, AT_ONCE)
        slot, rest = share // (NUM_TIERS * splits), share % (NUM_TIERS * splits)
        expert = tl.load(ids + token * TOP_K + slot, mask=share < shares, other=-1)
        known = (expert >= 0) & (expert < NUM_EXPERTS)
        ends = offsets + rest // splits * (NUM_EXPERTS + 1) + tl.where(known, expert, 0)
        count = tl.load(ends + 1, mask=known, other=0) - tl.load(ends, mask=known, other=0)
        written = (count > rest % splits * split_rows)[:, None] & existing
        at = (token * shares + share)[:, None] * D_MODEL + columns[None, :]
        total += tl.sum(tl.load(partial + at, mask=written, other=0.0).to(tl.float32), axis=0)
    tl.store(
        out + token * D_MODEL + columns, total.to(out.dtype.element_ty), mask=columns < D_MODEL
    )
