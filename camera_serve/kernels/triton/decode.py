"""Packed words as weights, in registers."""

# Kernels take values of Triton, which has no types for them.
# mypy: disable-error-code="import-untyped, no-untyped-def"

import triton
import triton.language as tl

from camera_serve.kernels.triton.layout import middle_code, slices_of
from camera_serve.kernels.triton.ptx import decode_constraints, decode_source
from camera_serve.ragged.packing import PACKED_BITS

# Compiled code may look constants up, but not call ordinary functions.
SLICES_OF = tl.constexpr({bits: slices_of(bits) for bits in PACKED_BITS})
_MIDDLE = tl.constexpr({bits: middle_code(bits) for bits in PACKED_BITS})
_OPERANDS = tl.constexpr({bits: decode_constraints(bits) for bits in PACKED_BITS})
_BF16 = tl.constexpr((tl.bfloat16,))
_FP16 = tl.constexpr((tl.float16,))
_BF16_SOURCES = tl.constexpr(
    {bits: [decode_source(bits, "bf16", j) for j in range(slices_of(bits))] for bits in PACKED_BITS}
)
_FP16_SOURCES = tl.constexpr(
    {bits: [decode_source(bits, "f16", j) for j in range(slices_of(bits))] for bits in PACKED_BITS}
)


@triton.constexpr_function
def slices_per_group(group_size, length, slices):
    """Consecutive slices that share their grid: as many as a power-of-two group holds, or one."""
    if group_size & (group_size - 1):
        return 1
    return min(group_size // length, slices)


@triton.jit
def load_words(
    matrix,
    rows,
    real,
    lanes,
    span,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    D_MODEL: tl.constexpr,
):
    """A span's words of some rows: 16 bits of the low plane, 8 of the high plane.

    matrix: the expert's first row; rows, real and lanes: two-dimensional, either way round. Where a
    tier has one plane only, both are that one.
    """
    LOW_BYTES: tl.constexpr = D_MODEL // 8 * (BITS // 2 * 2)
    STRIDE: tl.constexpr = D_MODEL // 8 * BITS
    held = real & (lanes < LENGTH)
    if BITS > 1:
        words = matrix.to(tl.pointer_type(tl.int16)) + (span * LENGTH + lanes)
        low = tl.load(words + rows * (STRIDE // 2), mask=held, other=0)
        high = low
    if BITS % 2 == 1:
        bits = matrix.to(tl.pointer_type(tl.int8)) + LOW_BYTES + (span * LENGTH + lanes)
        high = tl.load(bits + rows * STRIDE, mask=held, other=0)
        if BITS == 1:
            low = high
    return low, high


@triton.jit
def decode(
    low, high, grid, SLICE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """One slice of some words as weights in DTYPE.

    low, high: what `load_words` gives; grid: scale in the low half and zero in the high half, of a
    shape that broadcasts. Triton's own conversions would take three times the integer instructions
    of PTX, which is what few tokens are bound by; its interpreter and other GPUs have no PTX.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if PTX:
        source: tl.constexpr = _BF16_SOURCES[BITS][SLICE] if BF16 else _FP16_SOURCES[BITS][SLICE]
        operands: tl.constexpr = _OPERANDS[BITS]
        kinds: tl.constexpr = _BF16 if BF16 else _FP16
        if BITS == 1:
            weights = tl.inline_asm_elementwise(source, operands, [high, grid], kinds, True, 4)
        elif BITS == 3:
            weights = tl.inline_asm_elementwise(source, operands, [low, high, grid], kinds, True, 4)
        else:
            weights = tl.inline_asm_elementwise(source, operands, [low, grid], kinds, True, 4)
        return weights[0]
    else:
        WIDTH: tl.constexpr = 1 if BITS == 1 else BITS // 2 * 2
        code = (low.to(tl.int32) >> (WIDTH * SLICE)) & (2**WIDTH - 1)
        if BITS == 3:
            code = code | (((high.to(tl.int32) >> SLICE) & 1) << 2)
        HALF: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        MIDDLE: tl.constexpr = _MIDDLE[BITS] if BF16 else 0
        scale = (grid & 0xFFFF).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
        zero = (grid >> 16).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
        return ((code.to(tl.float32) - MIDDLE) * scale + zero).to(DTYPE)
