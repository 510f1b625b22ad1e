"""What each format's tensors stand for, against the code of those who write them."""

import pytest
import torch

from camera_serve.models.formats import Fp4, Fp8, Mxfp4, PackedInt, WeightFormat
from tests import originals
from tests.originals import Encoder

FORMATS: dict[str, tuple[WeightFormat, Encoder]] = {
    "fp8 blocks": (Fp8("_scale_inv", (16, 32)), originals.fp8((16, 32))),
    "fp8 blocks, powers of two": (
        Fp8("_scale_inv", (16, 32)),
        originals.fp8((16, 32), dtype=torch.float8_e8m0fnu),
    ),
    "fp8 per matrix": (Fp8("_scale", None), originals.fp8_whole("_scale", lambda rows: ())),
    "fp8 per row": (Fp8("_scale", None), originals.fp8_whole("_scale", lambda rows: (rows,))),
    "mxfp4": (Mxfp4(), originals.mxfp4),
    "nvfp4": (Fp4("", 16, "_scale_2"), originals.nvfp4("", "_scale_2", inverse=False)),
    "int4": (PackedInt(4, 16), originals.packed_int(4, 16)),
    "int4 with zeros": (PackedInt(4, 16, False), originals.packed_int(4, 16, symmetric=False)),
    "int8 per row": (PackedInt(8, None), originals.packed_int(8, None)),
}
EDGES = ("fp8 blocks", "fp8 blocks, powers of two", "fp8 per matrix", "fp8 per row")
"""Formats in which neither rows nor columns need be whole blocks."""


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights of very different sizes from row to row and from column to column."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    rows = torch.randn((*shape[:-1], 1), generator=generator).exp()
    return weight * rows * torch.randn((*shape[:-2], 1, shape[-1]), generator=generator).exp()


def decode(
    format_: WeightFormat, parts: dict[str, torch.Tensor], first_row: int = 0
) -> torch.Tensor:
    return format_.decode({**parts, **format_.scales(parts)}, first_row)


def shapes_of(parts: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(part.shape) for suffix, part in parts.items()}


def shapes(name: str) -> list[tuple[int, int]]:
    return [(48, 64), (1, 32), (3, 96), *([(33, 70), (15, 1), (17, 31)] if name in EDGES else [])]


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_what_the_formula_says(name: str) -> None:
    format_, encode = FORMATS[name]
    for shape in shapes(name):
        weight = random_weight(*shape)
        parts, wanted = encode(weight)
        assert parts.keys() == format_.dtypes.keys()
        assert format_.shape(shapes_of(parts)) == shape
        for suffix, accepted in format_.part_shapes(shape).items():
            assert tuple(parts[suffix].shape) in accepted
        assert decode(format_, parts).equal(wanted)
        # And the code is one of this weight, or all of this would hold for any.
        assert (wanted - weight).norm() < 0.3 * weight.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_decoded_alone(name: str) -> None:
    format_, encode = FORMATS[name]
    parts, wanted = encode(random_weight(48, 64))
    for rows in (slice(0, 48), slice(5, 6), slice(17, 40), slice(32, 48)):
        own = parts | {format_.codes: parts[format_.codes][rows]}
        assert decode(format_, own, rows.start).equal(wanted[rows])


@pytest.mark.parametrize("name", ["fp8 blocks", "mxfp4"])
def test_several_matrices_are_decoded_at_once(name: str) -> None:
    format_, encode = FORMATS[name]
    parts, wanted = encode(random_weight(3, 48, 64))
    assert format_.shape(shapes_of(parts)) == (3, 48, 64)
    assert decode(format_, parts).equal(wanted)


@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (5, 200), (130, 3)])
def test_fp8_blocks_are_those_of_compressed_tensors(shape: tuple[int, int]) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    parts, _ = originals.fp8((16, 32))(random_weight(*shape))
    theirs = converters.FP8BlockDequantizer(weight_block_size=(16, 32))
    wanted = theirs._create_dequantized_weight(parts[""], parts["_scale_inv"])
    assert decode(Fp8("_scale_inv", (16, 32)), parts).bfloat16().equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_blocks_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, _ = originals.fp8((16, 32), dtype=dtype)(random_weight(48, 64))
    theirs = Fp8Dequantize(None)._dequantize_one
    wanted = theirs(parts[""], parts["_scale_inv"], output_dtype=torch.bfloat16)
    assert decode(Fp8("_scale_inv", (16, 32)), parts).bfloat16().equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [(1,), (33, 1)])
def test_fp8_scales_of_matrices_and_rows_are_those_of_compressed_tensors(
    stored: tuple[int, ...], dtype: torch.dtype
) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    parts, _ = originals.fp8_whole("_scale", lambda rows: stored)(random_weight(33, 70))
    parts["_scale"] = parts["_scale"].to(dtype)
    wanted = forward.dequantize(parts[""], parts["_scale"])
    assert decode(Fp8("_scale", None), parts).to(dtype).equal(wanted)


def test_mxfp4_is_that_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts, _ = originals.mxfp4(random_weight(4, 6, 96))
    wanted = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])
    assert decode(Mxfp4(), parts).bfloat16().equal(wanted.mT)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((48, 64), 16), ((33, 36), 12), ((7, 24), None)])
def test_packed_integers_are_those_of_compressed_tensors(
    shape: tuple[int, int], group: int | None, symmetric: bool, bits: int
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    parts, ours = originals.packed_int(bits, group, symmetric=symmetric)(random_weight(*shape))
    arguments = {"num_bits": bits, "symmetric": symmetric, "group_size": group or -1}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    theirs = PackedQuantizationCompressor.decompress(
        {f"weight{suffix}": part for suffix, part in parts.items()}, scheme
    )
    format_ = PackedInt(bits, group, symmetric)
    assert decode(format_, parts).bfloat16().equal(theirs["weight"])
    assert decode(format_, parts).equal(ours)


def test_packed_integers_that_compressed_tensors_wrote_are_read() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight, scales = random_weight(9, 36), torch.full((9, 3), 0.5, dtype=torch.bfloat16)
    zeros = torch.randint(-8, 8, (9, 3), dtype=torch.int8)
    arguments = QuantizationArgs(num_bits=4, symmetric=False, group_size=12)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    written = PackedQuantizationCompressor.compress(state, scheme)
    parts = {name.removeprefix("weight"): part for name, part in written.items()}
    codes = (weight / 0.5 + zeros.repeat_interleave(12, 1)).clamp(-8, 7).round()
    wanted = (codes - zeros.repeat_interleave(12, 1)) * 0.5
    assert decode(PackedInt(4, 12, symmetric=False), parts).equal(wanted)


@pytest.mark.parametrize("inverse", [False, True])
def test_nvfp4_is_that_of_compressed_tensors(inverse: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

    parts, _ = originals.nvfp4("_packed", "_global_scale", inverse=True)(random_weight(9, 96))
    theirs = NVFP4PackedCompressor.decompress(
        {f"weight{suffix}": part for suffix, part in parts.items()}, scheme=None
    )
    format_ = Fp4("_packed", 16, "_global_scale", inverse=True)
    assert decode(format_, parts).bfloat16().equal(theirs["weight"].bfloat16())
    factor = {"": parts["_packed"], "_scale": parts["_scale"]}
    factor["_scale_2"] = 1 / parts["_global_scale"]
    close = decode(Fp4("", 16, "_scale_2"), factor)
    torch.testing.assert_close(close, decode(format_, parts), rtol=1e-6, atol=0)


def test_nvfp4_of_modelopt_is_that_of_vllm() -> None:
    emulation = pytest.importorskip(
        "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
    )
    parts, _ = originals.nvfp4("", "_scale_2", inverse=False)(random_weight(9, 96))
    wanted = emulation.dequantize_to_dtype(
        parts[""], parts["_scale"], parts["_scale_2"], torch.bfloat16, swizzle=False
    )
    assert decode(Fp4("", 16, "_scale_2"), parts).bfloat16().equal(wanted)


def test_mxfp4_in_linear_layers_is_that_of_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor

    parts, wanted = originals.mxfp4(random_weight(9, 96))
    own = {"_packed": parts["_blocks"].flatten(-2), "_scale": parts["_scales"]}
    theirs = MXFP4PackedCompressor.decompress(
        {f"weight{suffix}": part for suffix, part in own.items()}, scheme=None
    )
    assert decode(Fp4("_packed", 32), own).equal(wanted)
    assert wanted.bfloat16().equal(theirs["weight"].bfloat16())


def test_every_code_of_four_bits_is_its_number() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    parts = {
        "_blocks": originals.fp4_pairs(codes)[None, None],
        "_scales": torch.tensor([[127]], dtype=torch.uint8),
    }
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted = torch.tensor([*numbers, *(-n for n in numbers)] * 2)
    assert decode(Mxfp4(), parts).equal(wanted[None])


@pytest.mark.parametrize("exponent", [0, 1, 126, 127, 128, 253, 254])
def test_every_exponent_is_its_power_of_two(exponent: int) -> None:
    parts = {
        "_blocks": torch.full((1, 1, 16), 0x22, dtype=torch.uint8),
        "_scales": torch.tensor([[exponent]], dtype=torch.uint8),
    }
    assert decode(Mxfp4(), parts).double().eq(2.0 ** (exponent - 127)).all()


def test_an_exponent_that_is_no_number_is_none() -> None:
    parts = {"_scales": torch.tensor([[255, 127]], dtype=torch.uint8)}
    assert Mxfp4().scales(parts)["_scales"].isfinite().tolist() == [[False, True]]
