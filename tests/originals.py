"""Tiny checkpoints stored as originals are published: quantized, each beside its 16-bit copy.

Encoders of its own, and formulas written apart, so that this can judge the reader.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.editing import WEIGHTS, Tensors

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Parts = dict[str, torch.Tensor]
Encoder = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""A weight `[…, rows, columns]` -> its parts by suffix, and the float32 weight they stand for."""

LINEAR = r".*(?:_proj|_proj_with_mqa|\.w[123])\.weight"
"""Weights of linear layers, without routers, gates, embeddings and heads."""


@dataclass(frozen=True)
class Published:
    """A way of publishing: `encode` for weights whose name matches `quantized`.

    config: its `quantization_config`; extra: tensors beside each weight that nobody needs.
    """

    encode: Encoder
    config: dict[str, Any]
    quantized: str = LINEAR
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def publish(dense: Path, output: Path, way: Published) -> Path:
    """Write `dense` quantized to `output`, and what it stands for in 16 bits to `output-16bit`."""
    copy = output.with_name(f"{output.name}-16bit")
    tensors: Tensors = {}
    decoded: Tensors = {}
    for name, tensor in load_file(dense / WEIGHTS).items():
        if not re.fullmatch(way.quantized, name):
            tensors[name] = decoded[name] = tensor
            continue
        parts, weight = way.encode(tensor.float())
        tensors |= {f"{name}{suffix}": part.contiguous() for suffix, part in parts.items()}
        tensors |= {f"{name.removesuffix('weight')}{n}": t.clone() for n, t in way.extra.items()}
        decoded[name] = weight.to(tensor.dtype)
    for folder, stored in ((output, tensors), (copy, decoded)):
        shutil.copytree(dense, folder)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = way.config
    (output / "config.json").write_text(json.dumps(config))
    return copy


def expand(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for every weight of `shape`: blocks repeated, and cut off at the edges."""
    grown = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return grown[..., : shape[-2], : shape[-1]]


def largest_in_blocks(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest absolute value of each block, block by block."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape[-2:], block, strict=True))
    largest = torch.zeros(*weight.shape[:-2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            height, width = block
            part = weight[..., i * height : (i + 1) * height, j * width : (j + 1) * width]
            largest[..., i, j] = part.abs().amax((-2, -1))
    return largest


def fp8(
    block: tuple[int, int], suffix: str = "_scale_inv", dtype: torch.dtype = torch.float32
) -> Encoder:
    """FP8 with a scale per block, in float32 or another dtype."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        scales = (largest_in_blocks(weight, block) / 448).to(dtype)
        grown = expand(scales.float(), block, weight.shape)
        codes = (weight / grown).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": codes, suffix: scales}, codes.float() * grown

    return encode


def fp8_whole(suffix: str, shape: Callable[[int], tuple[int, ...]]) -> Encoder:
    """FP8 with a scale per matrix or row: `shape(rows)` is how the scales are stored."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        stored = shape(len(weight))
        per_row = torch.Size(stored).numel() == len(weight)
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax()
        scales = largest / 448
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {"": codes, suffix: scales.reshape(stored)}, codes.float() * scales

    return encode


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The codes of the four-bit floats nearest to `values`: uint8."""
    numbers = torch.cat([E2M1, -E2M1])
    return (values[..., None] - numbers).abs().argmin(-1).to(torch.uint8)


def fp4_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the low bits."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def mxfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """MXFP4 as gpt-oss has it: blocks of 32 with exponents."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    grown = exponents.exp2()[..., None]
    codes = nearest_e2m1(blocks / grown)
    numbers = torch.cat([E2M1, -E2M1])[codes.long()]
    parts = {"_blocks": fp4_pairs(codes), "_scales": (exponents + 127).to(torch.uint8)}
    return parts, (numbers * grown).flatten(-2)


def nvfp4(codes: str, factor: str, *, inverse: bool) -> Encoder:
    """NVFP4: groups of 16 with scales in FP8, and a factor for the whole matrix."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        overall = weight.abs().amax() / (6 * 448)
        stored = (1 / overall if inverse else overall).reshape(1)
        groups = weight.unflatten(-1, (-1, 16))
        scales = (groups.abs().amax(-1) / 6 / overall).to(torch.float8_e4m3fn)
        own = scales.float() / stored if inverse else scales.float() * stored
        chosen = nearest_e2m1(groups / own[..., None].clamp(min=1e-30))
        numbers = torch.cat([E2M1, -E2M1])[chosen.long()]
        parts = {codes: fp4_pairs(chosen.flatten(-2)), "_scale": scales, factor: stored}
        return parts, (numbers * own[..., None]).flatten(-2)

    return encode


def packed_int(bits: int, group: int | None, *, symmetric: bool = True) -> Encoder:
    """Integers packed into words: a number's bits are placed one by one, as Python integers."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = weight.unflatten(-1, (-1, group or weight.shape[1]))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        levels = 2**bits - 1
        if symmetric:
            scales = (2 * torch.maximum(-low, high) / levels).bfloat16().float()
            zeros = torch.full_like(scales, 2 ** (bits - 1))
        else:
            scales = ((high - low) / levels).bfloat16().float()
            zeros = (-low / scales).round().clamp(0, levels)
        codes = (groups / scales + zeros).round().clamp(0, levels)
        parts = {
            "_packed": words(codes.flatten(-2), bits),
            "_scale": scales[..., 0].bfloat16(),
            "_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["_zero_point"] = words(zeros[..., 0].T, bits).T
        return parts, ((codes - zeros) * scales).flatten(-2)

    return encode


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as int32, the first code in the lowest bits; the last word may have fewer."""
    per_word = 32 // bits
    rows = []
    for row in codes.int().tolist():
        parts = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        numbers = [sum(code << (bits * i) for i, code in enumerate(part)) for part in parts]
        rows.append([number - 2**32 if number >= 2**31 else number for number in numbers])
    return torch.tensor(rows, dtype=torch.int32)


def compressed_tensors(
    format_: str, ignore: tuple[str, ...] = (), **weights: Any
) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors with one group of linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignore],
    }


FP8_BLOCKS = Published(
    fp8((128, 128)),
    {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
)
"""DeepSeek-V3, Qwen3-MoE-FP8, MiniMax-M2."""

INT = {"type": "int", "symmetric": True, "actorder": None, "dynamic": False}
FLOAT = {"type": "float", "symmetric": True, "num_bits": 8, "dynamic": False}

WAYS = {
    "fp8 blocks": FP8_BLOCKS,
    "fp8 blocks, bf16 scales": Published(
        fp8((32, 48), dtype=torch.bfloat16), FP8_BLOCKS.config | {"weight_block_size": [32, 48]}
    ),
    "fp8 per tensor": Published(
        fp8_whole("_scale", lambda rows: ()),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        extra={"input_scale": torch.tensor(0.5)},
    ),
    "fp8 per tensor, transformers": Published(
        fp8_whole("_scale_inv", lambda rows: ()),
        {"quant_method": "fp8", "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
    ),
    "compressed-tensors fp8 per row": Published(
        fp8_whole("_scale", lambda rows: (rows, 1)),
        compressed_tensors("float-quantized", ("re:.*mlp.gate$",), **FLOAT, strategy="channel"),
    ),
    "compressed-tensors fp8 blocks": Published(
        fp8((128, 128), "_scale"),
        compressed_tensors(
            "float-quantized", **FLOAT, strategy="block", block_structure=[128, 128]
        ),
    ),
    "int4 groups": Published(
        packed_int(4, 32),
        compressed_tensors(
            "pack-quantized",
            ("re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.(gate|up|down)_proj"),
            **INT,
            num_bits=4,
            strategy="group",
            group_size=32,
        ),
        quantized=r".*\.experts\.\d+\..*\.weight",
    ),
    "int4 groups, zero points": Published(
        packed_int(4, 16, symmetric=False),
        compressed_tensors(
            "pack-quantized",
            **INT | {"symmetric": False, "actorder": "static"},
            num_bits=4,
            strategy="group",
            group_size=16,
        ),
    ),
    "int8 per row": Published(
        packed_int(8, None),
        compressed_tensors("pack-quantized", **INT, num_bits=8, strategy="channel"),
    ),
    "nvfp4 of modelopt": Published(
        nvfp4("", "_scale_2", inverse=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"]},
        extra={"input_scale": torch.tensor(0.5)},
    ),
    "nvfp4 of compressed-tensors": Published(
        nvfp4("_packed", "_global_scale", inverse=True),
        compressed_tensors(
            "nvfp4-pack-quantized",
            **FLOAT | {"num_bits": 4},
            strategy="tensor_group",
            group_size=16,
        ),
        extra={"input_global_scale": torch.tensor([2.0])},
    ),
    "fp8 of modelopt": Published(
        fp8_whole("_scale", lambda rows: (1,)),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        extra={"input_scale": torch.tensor(0.5)},
    ),
}
"""Ways that original checkpoints with single experts are published."""
