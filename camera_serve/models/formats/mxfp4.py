"""MXFP4 as gpt-oss stores it: `NAME_blocks` of 32 E2M1 numbers, `NAME_scales` their exponents.

As in transformers `integrations/mxfp4.py`, `_convert_moe_packed_tensors`, which transposes the
result; here the rows stay rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from camera_serve.models.formats.base import Shape, apply_scales, decode_fp4, exponents

BLOCK = 32


@dataclass(frozen=True)
class Mxfp4:
    """`number[i, j] * 2 ** (scale[i, j // 32] - 127)`: blocks `[…, rows, columns / 32, 16]`."""

    @property
    def title(self) -> str:
        """The format in words."""
        return "MXFP4"

    @property
    def codes(self) -> str:
        """Sixteen bytes a block."""
        return "_blocks"

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """Bytes throughout."""
        return {"_blocks": ("U8",), "_scales": ("U8",)}

    @property
    def zero_scales(self) -> tuple[str, ...]:
        """Powers of two are never 0."""
        return ()

    def shape(self, parts: Mapping[str, Shape]) -> Shape:
        """That of the blocks, each of which is 32 columns."""
        *rows, blocks, half = parts["_blocks"]
        return (*rows, 2 * half * blocks)

    def part_shapes(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """Whole blocks only."""
        *rows, columns = shape
        blocks = columns // BLOCK
        return {"_blocks": ((*rows, blocks, BLOCK // 2),), "_scales": ((*rows, blocks),)}

    def scales(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Powers of two."""
        return {"_scales": exponents(parts["_scales"])}

    def decode(self, parts: Mapping[str, torch.Tensor], first_row: int = 0) -> torch.Tensor:
        """Exact: each is a four-bit float times a power of two."""
        values = decode_fp4(parts["_blocks"].flatten(-2))
        return apply_scales(values, parts["_scales"], (1, BLOCK), first_row)
