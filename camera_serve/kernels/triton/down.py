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
    BITS: tl.constexpr,
    BUNDLES: tl.constexpr,
    UNITS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    DIRECT: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program: some columns from one split of one expert's bundle, BLOCK slots at a time.

    A split is `split_rows` micro-experts of each tier of an expert. partial: `[num_slots,
    num_bundles, splits, d_model]`; splits without micro-experts are not written. BITS: of each
    tier. BUNDLES: as `tiles.bundles` gives them. UNITS: the programs that cover d_model in all of
    them. `side_by_side` programs share an expert's slots; when DIRECT each has one slot.
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
        for b in tl.static_range(len(BUNDLES)):
            pieces = BUNDLES[b][4]
            if (rest >= 0) & (rest < pieces * splits):
                split = rest // pieces
                share = (slots * len(BUNDLES) + b).to(tl.int64) * splits + split
                for p in tl.static_range(MOST_PARTS):
                    # Decided before it is compiled, unlike the other one.
                    if p < BUNDLES[b][5]:  # noqa: SIM102
                        if rest % BUNDLES[b][5] == p:
                            _bundle(
                                hidden + positions.to(tl.int64)[:, None] * width,
                                partial + share[:, None] * D_MODEL, inside, offsets, tensors,
                                expert, split * split_rows, split_rows,
                                rest % pieces // BUNDLES[b][5], BITS, BUNDLES, b, p, NUM_EXPERTS,
                                D_MODEL, GROUP_SIZE, BLOCK, STEP, PTX,
                            )  # fmt: skip
            rest -= pieces * splits


@triton.jit
def _bundle(
    activations,
    out,
    inside,
    offsets,
    tensors,
    expert,
    start,
    split_rows,
    piece,
    BITS: tl.constexpr,
    BUNDLES: tl.constexpr,
    WHICH: tl.constexpr,
    PART: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PTX: tl.constexpr,
):
    """Store `[BLOCK, SLICES · LENGTH]`: activations times the rows from `start` on, of all tiers.

    SLICES: those of a span that are this part's, as many as there are registers for their sums.
    All tiers of a bundle are added up in registers: partial sums are what large batches move most
    of beside their tokens.
    """
    FIRST: tl.constexpr = BUNDLES[WHICH][0]
    STOP: tl.constexpr = BUNDLES[WHICH][1]
    SLICES: tl.constexpr = BUNDLES[WHICH][2] // BUNDLES[WHICH][5]
    FIRST_SLICE: tl.constexpr = PART * SLICES
    LENGTH: tl.constexpr = BUNDLES[WHICH][3]
    lanes = tl.arange(0, LENGTH if LENGTH > 16 else 16)
    sums = (tl.zeros((lanes.shape[0], BLOCK), tl.float32),) * SLICES
    column = 0
    most = 0
    for t in tl.static_range(STOP):
        ends = offsets + t * (NUM_EXPERTS + 1)
        base = tl.load(ends + expert)
        count = (tl.load(ends + expert + 1) - base).to(tl.int32)
        if t >= FIRST:
            stop = tl.minimum(start + split_rows, count)
            if BITS[t] == 16:
                sums = _dense(
                    sums, activations + column, inside, tensors[t], base, start, stop, piece,
                    LENGTH, D_MODEL, STEP,
                )  # fmt: skip
            else:
                total = tl.load(ends + NUM_EXPERTS)
                sums = _packed(
                    sums, activations + column, inside, tensors[t], base, total, start, stop,
                    piece, BITS[t], LENGTH, FIRST_SLICE, SLICES, D_MODEL, GROUP_SIZE, STEP, PTX,
                )  # fmt: skip
            most = tl.maximum(most, count)
        column += tl.cdiv(count, _COLUMN_UNIT) * _COLUMN_UNIT
    # Not in an `if`: Triton 3.6 cannot carry sums into one on Blackwell.
    wanted = inside & (start < most)
    for j in tl.static_range(SLICES):
        columns = (piece * BUNDLES[WHICH][2] + FIRST_SLICE + j) * LENGTH + lanes
        existing = (lanes < LENGTH) & (columns < D_MODEL)
        part = tl.trans(sums[j]).to(out.dtype.element_ty)
        tl.store(out + columns[None, :], part, mask=wanted[:, None] & existing[None, :])


@triton.jit
def _dense(
    sums,
    activations,
    inside,
    matrices,
    base,
    start,
    stop,
    piece,
    COLUMNS: tl.constexpr,
    D_MODEL: tl.constexpr,
    STEP: tl.constexpr,
):
    """`[COLUMNS, BLOCK]` sums with the products of 16-bit rows added, one piece of the columns."""
    matrix = matrices[0] + base * D_MODEL
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)
    total = sums[0]
    for row in range(start, stop, STEP):
        rows = row + tl.arange(0, STEP)
        held = (rows < stop)[:, None]
        if D_MODEL % COLUMNS != 0:
            held = held & (columns < D_MODEL)[None, :]
        tile = tl.load(matrix + rows[:, None] * D_MODEL + columns[None, :], mask=held, other=0.0)
        active = _activations(activations, inside, rows, stop)
        total = tl.dot(tl.trans(tile), active, total, input_precision="ieee")
    return (total,)


@triton.jit
def _packed(
    sums,
    activations,
    inside,
    matrices,
    base,
    total,
    start,
    stop,
    span,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    FIRST_SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    D_MODEL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sums of some slices of one span with the products of packed rows added."""
    DTYPE: tl.constexpr = activations.dtype.element_ty
    ALL_SLICES: tl.constexpr = SLICES_OF[BITS]
    PER_GRID: tl.constexpr = slices_per_group(GROUP_SIZE, LENGTH, ALL_SLICES)
    matrix = matrices[0] + base * (D_MODEL // 32 * BITS)
    lanes = tl.arange(0, LENGTH if LENGTH > 16 else 16)
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
                column = (span * ALL_SLICES + FIRST_SLICE + j) * LENGTH
                at = base + column // GROUP_SIZE * total
                grid = tl.load(matrices[1] + at + rows, mask=real, other=0)[None, :]
            tile = decode(low, high, grid, FIRST_SLICE + j, BITS, DTYPE, PTX)
            added += (tl.dot(tile, active, sums[j], input_precision="ieee"),)
        sums = added
    return sums


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
    NUM_BUNDLES: tl.constexpr,
    BUNDLE_OF: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    D_MODEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program: COLUMNS of one token's output, its partial sums added in float32, in order.

    BUNDLE_OF: the bundle of each tier.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    existing = (columns < D_MODEL)[None, :]
    parts = NUM_BUNDLES * splits
    shares = TOP_K * parts
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, shares, AT_ONCE):
        share = start + tl.arange(0, AT_ONCE)
        slot, rest = share // parts, share % parts
        expert = tl.load(ids + token * TOP_K + slot, mask=share < shares, other=-1)
        known = (expert >= 0) & (expert < NUM_EXPERTS)
        count = tl.zeros((AT_ONCE,), tl.int64)
        for t in tl.static_range(len(BUNDLE_OF)):
            summed = known & (rest // splits == BUNDLE_OF[t])
            ends = offsets + t * (NUM_EXPERTS + 1) + tl.where(known, expert, 0)
            stop = tl.load(ends + 1, mask=summed, other=0)
            count = tl.maximum(count, stop - tl.load(ends, mask=summed, other=0))
        written = (count > rest % splits * split_rows)[:, None] & existing
        at = (token * shares + share)[:, None] * D_MODEL + columns[None, :]
        total += tl.sum(tl.load(partial + at, mask=written, other=0.0).to(tl.float32), axis=0)
    tl.store(
        out + token * D_MODEL + columns, total.to(out.dtype.element_ty), mask=columns < D_MODEL
    )
