"""Packing for the Triton kernels, and the PTX that reads it, both without a GPU."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from camera_serve.kernels.triton import TritonTier, layout, pack_layer
from camera_serve.kernels.triton.layout import slice_length, slices_of
from camera_serve.kernels.triton.ptx import decode_constraints, decode_source
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier
from camera_serve.ragged.packing import pack

KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}


def packed_rows(codes: torch.Tensor, bits: int, group: int) -> PackedRows:
    scales = torch.rand(len(codes), codes.shape[1] // group).half() / 2**bits
    return PackedRows(bits, pack(codes, bits), scales, torch.randn(scales.shape).half())


def packed_tier(codes: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> TritonTier:
    return pack_layer(one_tier(packed_rows(codes, bits, group)), dtype).tiers[0]


def one_tier(rows: PackedRows) -> RaggedLayer:
    """gate, up and down alike, each in its own memory."""
    matrices = [deepcopy(rows) for _ in range(3)]
    return RaggedLayer((RaggedTier(*matrices, offsets=(0, len(rows.words))),))


def read_codes(words: torch.Tensor, bits: int, d_model: int, group: int) -> torch.Tensor:
    """Decode a packed row by row and bit by bit, as README.md says."""
    slices, length = slices_of(bits), slice_length(bits, d_model, group)
    low_bits = bits & ~1
    stream = words.numpy().view("uint8").reshape(len(words), -1)
    codes = torch.zeros(len(words), d_model, dtype=torch.int64)
    for row in range(len(words)):
        for column in range(d_model):
            span, rest = divmod(column, slices * length)
            j, word = divmod(rest, length)
            at = span * length + word
            low = int.from_bytes(stream[row, 2 * at : 2 * at + 2], "little") if low_bits else 0
            codes[row, column] = low >> (low_bits * j) & (2**low_bits - 1)
            if bits % 2:
                byte = int(stream[row, d_model * low_bits // 8 + at])
                codes[row, column] |= (byte >> j & 1) << low_bits
    return codes


def test_matrices_begin_where_16_bytes_can_be_read() -> None:
    codes = torch.randint(0, 4, (3, 128))
    words = torch.empty(3 * 8 + 1, dtype=torch.int32)[1:].view(3, 8).copy_(pack(codes, 2))
    packed = replace(packed_rows(codes, 2, 128), words=words)
    sixteen = torch.randn(3 * 128 + 1)[1:].view(3, 128)
    assert words.data_ptr() % 16 and sixteen.data_ptr() % 16
    tiers = (RaggedTier(*[sixteen] * 3, offsets=(0, 3)), one_tier(packed).tiers[0])
    first, second = pack_layer(RaggedLayer(tiers), torch.float32).tiers
    for tier in (first, second):
        assert not any(matrix.data_ptr() % 16 for matrix in (tier.gate, tier.up, tier.down))
    assert first.up.equal(sixteen)
    assert read_codes(second.gate, 2, 128, 128).equal(codes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("d_model, group", [(64, 32), (96, 96), (1024, 128)])
def test_packing_keeps_every_code_and_every_byte(bits: int, d_model: int, group: int) -> None:
    codes = torch.randint(0, 2**bits, (3, d_model))
    tier = packed_tier(codes, bits, group, torch.float16)
    assert read_codes(tier.gate, bits, d_model, group).equal(codes)
    assert tier.gate.nbytes == 3 * d_model * bits // 8
    assert tier.gate_grid.nbytes == 3 * (d_model // group) * 4


def test_grids_hold_scale_and_zero_as_they_are_in_float16() -> None:
    rows = packed_rows(torch.randint(0, 4, (5, 64)), 2, 32)
    layer = one_tier(rows)
    halves = (
        pack_layer(layer, torch.float16).tiers[0].up_grid.view(torch.float16).unflatten(1, (5, 2))
    )
    assert halves[..., 0].equal(rows.scales.t()) and halves[..., 1].equal(rows.zeros.t())


def test_grids_hold_the_middle_code_s_zero_in_bfloat16() -> None:
    rows = packed_rows(torch.randint(0, 4, (5, 64)), 2, 32)
    layer = one_tier(rows)
    grid = pack_layer(layer, torch.bfloat16).tiers[0].up_grid
    halves = grid.view(torch.bfloat16).unflatten(1, (5, 2)).float()
    middle = rows.zeros.float() + 2 * rows.scales.float()
    # One rounding to bfloat16.
    torch.testing.assert_close(halves[..., 0], rows.scales.float().t(), rtol=2**-8, atol=0)
    torch.testing.assert_close(halves[..., 1], middle.t(), rtol=2**-8, atol=0)


def test_packed_rows_are_reordered_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (7, 96))
    layer = one_tier(packed_rows(codes, 3, 32))
    # Three rows at a time, the last alone.
    monkeypatch.setattr(layout, "_WEIGHTS_AT_ONCE", 3 * 96)
    given = (layer.tiers[0].gate, layer.tiers[0].up, layer.tiers[0].down)
    (tier,) = pack_layer(layer, torch.float16).tiers
    for matrix, rows in zip((tier.gate, tier.up, tier.down), given, strict=True):
        assert matrix.data_ptr() == rows.words.data_ptr()
        assert read_codes(matrix, 3, 96, 32).equal(codes)


def test_rows_of_16_bits_are_shared_and_not_copied() -> None:
    rows = [torch.randn(6, 32) for _ in range(3)]
    layer = pack_layer(RaggedLayer((RaggedTier(*rows, offsets=(0, 2, 2, 6)),)), torch.float32)
    (tier,) = layer.tiers
    held = (tier.gate, tier.up, tier.down)
    assert [t.data_ptr() for t in held] == [t.data_ptr() for t in rows]
    assert layer.offsets.tolist() == [[0, 2, 2, 6]] and layer.offsets.dtype == torch.int64
    assert (layer.most_rows, layer.width) == (4, 16)


def test_tiles_are_listed_expert_by_expert_and_tier_by_tier() -> None:
    tiers = [
        RaggedTier(*[torch.randn(offsets[-1], 32)] * 3, offsets=offsets)
        for offsets in ((0, 20, 20, 53), (0, 0, 16, 17))
    ]
    layer = pack_layer(RaggedLayer(tuple(tiers)), torch.float32)
    by_sixteen, *_, by_most = layer.tile_lists
    assert by_sixteen.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert by_most.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1]]
    # 20 and 0 columns, 0 and 16, 33 and 1: each rounded up to 16.
    assert layer.width == 64


def test_another_dtype_than_the_rows_is_refused() -> None:
    rows = [torch.randn(6, 32) for _ in range(3)]
    layer = RaggedLayer((RaggedTier(*rows, offsets=(0, 6)),))
    with pytest.raises(ValueError, match=r"torch.float32, and the layer computes in torch.float16"):
        pack_layer(layer, torch.float16)


def run_ptx(source: str, inputs: list[torch.Tensor], kind: str) -> tuple[torch.Tensor, ...]:
    """Execute the few instructions `decode_source` uses on int64 tensors of 32-bit registers."""
    registers = {f"${2 + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> torch.Tensor:
        if name.startswith("0x") or name.isdigit():
            return torch.full_like(inputs[0], int(name, 0))
        return registers[name]

    for line in source.splitlines():
        if line[0] in "{}" or line.startswith(".reg"):
            continue
        operation, operands = re.fullmatch(r"(\S+) (.*);", line).groups()
        target, *names = operands.split(", ")
        sources = [value(name) for name in names]
        registers[target] = OPERATIONS[operation.split(".")[0]](kind, *sources) & 0xFFFFFFFF
    return registers["$0"], registers["$1"]


def permuted(kind: str, a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    both, out = a | b << 32, torch.zeros_like(a)
    for byte in range(4):
        chosen = selector >> (4 * byte) & 7
        # Bytes of b shifted into the sign come back sign-extended: masked here.
        out |= (both >> (8 * chosen) & 0xFF) << (8 * byte)
    return out


def fused(kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(a)
    for shift in (0, 16):
        x, y, z = (as_numbers(part >> shift & 0xFFFF, KINDS[kind]) for part in (a, b, c))
        # Products of two such numbers plus a third one are exact in float64, so it rounds once.
        out |= as_bits((x * y + z).to(KINDS[kind])) << shift
    return out


def as_numbers(halves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (halves - (halves >= 2**15) * 2**16).to(torch.int16).view(dtype).double()


def as_bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(torch.int16).long() & 0xFFFF


OPERATIONS = {
    "mov": lambda kind, a: a,
    "shr": lambda kind, a, by: a >> by,
    "shl": lambda kind, a, by: a << by,
    "lop3": lambda kind, a, b, c, table: (a & b) | c,
    "prmt": permuted,
    "fma": fused,
}


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_ptx_makes_code_times_scale_plus_zero(bits: int, kind: str) -> None:
    dtype, low_bits, count = KINDS[kind], bits & ~1, 512
    words = torch.randint(0, 2**16, (count, 4))
    high = torch.randint(0, 256, (count, 4))
    scales, zeros = torch.rand(count, 4).to(dtype), torch.randn(count, 4).to(dtype)
    inputs = [words[:, 0] | words[:, 1] << 16, words[:, 2] | words[:, 3] << 16] if low_bits else []
    if bits % 2:
        inputs.append(sum(high[:, i] << (8 * i) for i in range(4)))
    grids = as_bits(scales) | as_bits(zeros) << 16
    inputs += list(grids.unbind(1))
    assert decode_constraints(bits).split(",").count("r") == len(inputs)
    for j in range(slices_of(bits)):
        codes = words >> (low_bits * j) & (2**low_bits - 1)
        if bits % 2:
            codes |= (high >> j & 1) << low_bits
        if kind == "bf16":
            codes -= 2 ** (bits - 1)
        found = run_ptx(decode_source(bits, kind, j), inputs, kind)
        numbers = [as_numbers(reg >> shift & 0xFFFF, dtype) for reg in found for shift in (0, 16)]
        wanted = (codes * scales.double() + zeros.double()).to(dtype).double()
        assert torch.stack(numbers, 1).equal(wanted)
