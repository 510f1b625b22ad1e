"""Ragged layers as the Triton kernels read them: packed once, after loading."""

from dataclasses import dataclass

import torch

from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.packing import unpack

LONGEST_SLICE = 64
"""Rows of the smallest tile that Hopper's matrix units take."""

_READ_BYTES = 16
"""Of one thread's widest read."""

COLUMN_UNIT = 16
"""Activations of a tier begin at multiples of this, for 16-byte reads."""

TILE_ROWS = (16, 32, 64, 128)
"""Micro-experts that a program of gate_up may take."""

_SLICES = {8: 2, 4: 4, 3: 8, 2: 8, 1: 8}
_WEIGHTS_AT_ONCE = 2**21
"""Weights re-ordered at once, at some 50 bytes each meanwhile: 0.1 GB for any layer."""


@dataclass(frozen=True)
class TritonTier:
    """One tier: the rows of three matrices, and the grids of packed ones.

    gate, up, down: `[num_rows, d_model]` weights, or int32 words `[num_rows, d_model·bits/32]` in
    the order README.md gives. *_grid: int32 `[num_groups, num_rows]`, scale in the low half and
    zero in the high half, both in bfloat16 for bfloat16 models and in float16 otherwise; without
    elements for 16-bit tiers.
    """

    bits: int
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_grid: torch.Tensor
    up_grid: torch.Tensor
    down_grid: torch.Tensor


@dataclass(frozen=True)
class TritonLayer:
    """A ragged layer for the Triton kernels: tensors, and numbers that are fixed once loaded.

    offsets: int64 `[num_tiers, num_experts + 1]`; expert e owns the rows
    `offsets[t, e]:offsets[t, e + 1]` of tier t. most_rows: of any expert in any tier. width:
    columns that hold one token's activations of any expert, each tier's rounded up to
    `COLUMN_UNIT`. tile_lists: for each of `TILE_ROWS`, int32 `[num_tiles, 2]` of the expert of
    every tile of so many rows, and which of its tiles it is, tier after tier.
    """

    tiers: tuple[TritonTier, ...]
    offsets: torch.Tensor
    tile_lists: tuple[torch.Tensor, ...]
    num_experts: int
    d_model: int
    group_size: int
    most_rows: int
    width: int


def pack_layer(layer: RaggedLayer, dtype: torch.dtype) -> TritonLayer:
    """Repack a layer once for the Triton kernels, on the device it is on; `layer` is used up.

    dtype: what the layer computes in, as x will have. Tensors of 16-bit tiers are shared with
    `layer`, and packed ones are re-ordered where they lie, unless they begin where 16 bytes cannot
    be read at once: only grids are new, and 0.1 GB is taken meanwhile. Raises `ValueError` when a
    16-bit tier has another dtype.
    """
    first = layer.tiers[0].gate
    counts = torch.tensor([tier.offsets for tier in layer.tiers]).diff(dim=1)
    device = first.words.device if isinstance(first, PackedRows) else first.device
    offsets = torch.tensor([tier.offsets for tier in layer.tiers], dtype=torch.int64, device=device)
    return TritonLayer(
        tiers=tuple(_pack_tier(tier, dtype) for tier in layer.tiers),
        offsets=offsets,
        tile_lists=tuple(_tile_list(counts, rows).to(device) for rows in TILE_ROWS),
        num_experts=layer.num_experts,
        d_model=_d_model(first),
        group_size=_group_size(layer),
        most_rows=int(counts.max()),
        width=width_of(counts),
    )


def width_of(counts: torch.Tensor) -> int:
    """A layer's `width`. counts: micro-experts `[num_tiers, num_experts]`."""
    columns = (counts + COLUMN_UNIT - 1) // COLUMN_UNIT * COLUMN_UNIT
    return max(COLUMN_UNIT, int(columns.sum(0).max()))


def _tile_list(counts: torch.Tensor, rows: int) -> torch.Tensor:
    """counts: micro-experts `[num_tiers, num_experts]`."""
    tiles = ((counts + rows - 1) // rows).sum(0).tolist()
    listed = [(expert, tile) for expert, count in enumerate(tiles) for tile in range(count)]
    return torch.tensor(listed, dtype=torch.int32).view(-1, 2)


def slices_of(bits: int) -> int:
    """Codes whose bits lie in one 16-bit word of the low plane, or one byte of the high plane."""
    return _SLICES[bits]


def slice_length(bits: int, d_model: int, group_size: int) -> int:
    """Consecutive weights of a row that lie at the same bits of consecutive words.

    A slice does not cross a group, and whole spans of `slices_of(bits)` slices fill a row.
    """
    fitting = _power_of_two_in(d_model) // slices_of(bits)
    return min(LONGEST_SLICE, fitting, _power_of_two_in(group_size))


def _power_of_two_in(number: int) -> int:
    return number & -number


def _d_model(rows: Rows) -> int:
    if isinstance(rows, PackedRows):
        return rows.words.shape[1] * 32 // rows.bits
    return rows.shape[1]


def _group_size(layer: RaggedLayer) -> int:
    for tier in layer.tiers:
        if isinstance(tier.gate, PackedRows):
            return _d_model(tier.gate) // tier.gate.scales.shape[1]
    return _d_model(layer.tiers[0].gate)


def _pack_tier(tier: RaggedTier[Rows], dtype: torch.dtype) -> TritonTier:
    gate, up, down = tier.gate, tier.up, tier.down
    if not isinstance(gate, PackedRows):
        assert isinstance(up, torch.Tensor) and isinstance(down, torch.Tensor)
        if gate.dtype != dtype:
            raise ValueError(f"a tier is held in {gate.dtype}, and the layer computes in {dtype}")
        empty = torch.empty(0, dtype=torch.int32, device=gate.device)
        rows = (_aligned(gate, _READ_BYTES), _aligned(up, _READ_BYTES), _aligned(down, _READ_BYTES))
        return TritonTier(16, *rows, empty, empty, empty)
    assert isinstance(up, PackedRows) and isinstance(down, PackedRows)
    grids = (_grid(rows, dtype) for rows in (gate, up, down))
    return TritonTier(gate.bits, *(_interleave(rows) for rows in (gate, up, down)), *grids)


def _aligned(matrix: torch.Tensor, row_unit: int) -> torch.Tensor:
    """A matrix whose rows all begin at 16 bytes, if they are multiples of `row_unit` bytes.

    Tiers that were loaded side by side begin there by themselves in that case; others are copied.
    """
    matrix = matrix.contiguous()
    if matrix[:1].nbytes % row_unit == 0 and matrix.data_ptr() % _READ_BYTES:
        return matrix.clone()
    return matrix


def _interleave(rows: PackedRows) -> torch.Tensor:
    """Regroup the codes of each row in place: low bits as 16-bit words, then high bits as bytes.

    In a span of `slices · length` weights, word i holds the codes i, i + length, i + 2·length, …
    """
    d_model, slices = _d_model(rows), slices_of(rows.bits)
    length = slice_length(rows.bits, d_model, d_model // rows.scales.shape[1])
    low_bits = rows.bits & ~1
    in_bytes = rows.words.view(torch.uint8)
    shifts = torch.arange(slices, device=in_bytes.device, dtype=torch.int32)[:, None]
    at_once = max(1, _WEIGHTS_AT_ONCE // d_model)
    for start in range(0, len(in_bytes), at_once):
        part = slice(start, start + at_once)
        codes = unpack(rows.words[part], rows.bits, d_model).int()
        spans = codes.view(len(codes), -1, slices, length)
        if low_bits:
            low = ((spans & (2**low_bits - 1)) << (shifts * low_bits)).sum(2, dtype=torch.int32)
            words = low.to(torch.int16).flatten(1).contiguous()
            in_bytes[part, : d_model * low_bits // 8] = words.view(torch.uint8)
        if rows.bits > low_bits:
            high = ((spans >> low_bits) << shifts).sum(2, dtype=torch.int32)
            in_bytes[part, d_model * low_bits // 8 :] = high.to(torch.uint8).flatten(1)
    return _aligned(rows.words, _READ_BYTES * rows.bits)


def _grid(rows: PackedRows, dtype: torch.dtype) -> torch.Tensor:
    """Scale and zero side by side, `[num_groups, num_rows]`.

    In bfloat16 the zero is that of the middle code: both then have a rounding error that is small
    against the weight, where the lowest code's would be large against the weights near 0.
    """
    scales, zeros = rows.scales, rows.zeros
    if dtype == torch.bfloat16:
        zeros = (zeros.float() + scales.float() * middle_code(rows.bits)).bfloat16()
        scales = scales.bfloat16()
    low = scales.view(torch.int16).int() & 0xFFFF
    return (low | zeros.view(torch.int16).int() << 16).t().contiguous()


def middle_code(bits: int) -> int:
    """The code that stands for the grid's zero in bfloat16 layers."""
    return 2 ** (bits - 1)
