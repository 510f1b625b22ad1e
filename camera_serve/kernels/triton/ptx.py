"""PTX that turns packed words into pairs of 16-bit weights.

The bits of a code set into the mantissa of a power of two, where the last place is worth 1, are
that power plus the code; one fused multiply-add takes the power away, exactly, and another one
applies scale and zero. Both halves of a register are decoded at once, and slices whose bits fit
into the mantissa together share a shift.
"""

import struct
from collections.abc import Iterator

from camera_serve.kernels.triton.layout import middle_code

_MANTISSA = {"bf16": 7, "f16": 10}
_AND_OR = "0xEA"
"""lop3's truth table of `(a & b) | c`."""


def decode_source(bits: int, kind: str, slice_index: int) -> str:
    """Inline PTX for four elements: from the planes' words and grids to one slice's weights.

    kind: `bf16`, whose zero belongs to the middle code, or `f16`. Operands: two registers of
    weights; two of 16-bit words of the low plane, unless bits are 1; one of bytes of the high
    plane, if bits are odd; four grids.
    """
    lines = [
        ".reg .b32 word, bit, t, r, one, base, away, scale, zero;",
        f"mov.b32 one, {_pair(1.0, kind)};",
    ]
    for pair in (0, 1):
        lines += _inputs(bits, pair)
        wide = bits > _MANTISSA[kind]
        lines += _byte(slice_index, pair) if wide else _code(bits, kind, slice_index, pair)
        lines.append(f"fma.rn.{kind}x2 ${pair}, ${pair}, scale, zero;")
    return "\n".join(["{", *lines, "}"])


def decode_constraints(bits: int) -> str:
    """Operands of `decode_source`: outputs are written before all inputs are read."""
    return ",".join(["=&r"] * 2 + ["r"] * (_plane_inputs(bits) + 4))


def _plane_inputs(bits: int) -> int:
    return (2 if bits > 1 else 0) + bits % 2


def _inputs(bits: int, pair: int) -> Iterator[str]:
    """Name a pair's inputs: `word` holds two words of the only or low plane, `bit` two bytes."""
    if bits > 1:
        yield f"mov.b32 word, ${2 + pair};"
    if bits % 2:
        target, source = ("bit", "$4") if bits > 1 else ("word", "$2")
        yield f"prmt.b32 {target}, {source}, {source}, {('0x1100', '0x3322')[pair]};"
    first = 2 + _plane_inputs(bits) + 2 * pair
    yield f"prmt.b32 scale, ${first}, ${first + 1}, 0x5410;"
    yield f"prmt.b32 zero, ${first}, ${first + 1}, 0x7632;"


def _code(bits: int, kind: str, slice_index: int, pair: int) -> Iterator[str]:
    width = 1 if bits == 1 else bits & ~1
    # Slices that fit into the mantissa together share a shift.
    together = (_MANTISSA[kind] - bits) // width + 1
    shift = slice_index // together * together * width
    at = slice_index * width - shift
    yield f"shr.b32 t, word, {shift};"
    base = 2.0 ** (_MANTISSA[kind] - at)
    yield from _based(f"${pair}", _mask(width, at), base, kind)
    if bits == 3:
        right = slice_index - at - 2
        yield f"{'shr' if right >= 0 else 'shl'}.b32 r, bit, {abs(right)};"
        yield f"lop3.b32 ${pair}, r, {_mask(1, at + 2)}, ${pair}, {_AND_OR};"
    yield from _away(f"${pair}", base + (middle_code(bits) if kind == "bf16" else 0), kind)


def _byte(slice_index: int, pair: int) -> Iterator[str]:
    """8 bits in bf16, whose mantissa holds 7: the two nibbles apart, then their sum."""
    for target, nibble, unit, middle in ((f"${pair}", 0, 1, 0), ("r", 1, 16, middle_code(8))):
        yield f"shr.b32 t, word, {8 * slice_index + 4 * nibble};"
        yield from _based(target, _mask(4, 0), 128.0 * unit, "bf16")
        yield from _away(target, 128.0 * unit + middle, "bf16")
    yield f"fma.rn.bf16x2 ${pair}, ${pair}, one, r;"


def _based(target: str, mask: str, base: float, kind: str) -> Iterator[str]:
    yield f"mov.b32 base, {_pair(base, kind)};"
    yield f"lop3.b32 {target}, t, {mask}, base, {_AND_OR};"


def _away(target: str, number: float, kind: str) -> Iterator[str]:
    yield f"mov.b32 away, {_pair(-number, kind)};"
    yield f"fma.rn.{kind}x2 {target}, {target}, one, away;"


def _mask(width: int, at: int) -> str:
    return f"0x{(2**width - 1 << at) * 0x10001:08x}"


def _pair(number: float, kind: str) -> str:
    """A number in both halves of a register; every one used here is exact in `kind`."""
    if kind == "f16":
        (half,) = struct.unpack("<H", struct.pack("<e", number))
    else:
        half = struct.unpack("<I", struct.pack("<f", number))[0] >> 16
    return f"0x{half * 0x10001:08x}"
