"""Integers of 4 or 8 bits, packed into int32 along the rows: `pack-quantized`.

As in compressed-tensors `compressors/pack_quantized`: the low bits first, stored with an offset of
half the range; zero points alike, but packed along the columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from camera_serve.models.formats.base import FLOATS, Shape, apply_scales, ceil_div

WORD = 32
"""Bits that codes are packed into."""


@dataclass(frozen=True)
class PackedInt:
    """`(code[i, j] - zero[i, j // group]) * scale[i, j // group]`.

    group: columns that share a scale, None for all of a row's; symmetric: the zero is half the
    range and not stored.
    """

    bits: int
    group: int | None
    symmetric: bool = True

    @property
    def title(self) -> str:
        """The format in words."""
        groups = f"in groups of {self.group}" if self.group else "with a scale per row"
        return f"int{self.bits} {groups}"

    @property
    def codes(self) -> str:
        """Eight codes of four bits in a word."""
        return "_packed"

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """Words, floats, and two integers that repeat the weight's shape."""
        parts = {"_packed": ("I32",), "_scale": FLOATS, "_shape": ("I64", "I32")}
        return parts if self.symmetric else {**parts, "_zero_point": ("I32",)}

    @property
    def zero_scales(self) -> tuple[str, ...]:
        """None may be 0."""
        return ()

    def shape(self, parts: Mapping[str, Shape]) -> Shape:
        """Whole groups of columns, as compressed-tensors wants them; without groups whole words."""
        columns = parts["_packed"][-1] * (WORD // self.bits)
        if self.group is not None:
            columns = parts["_scale"][-1] * self.group if parts["_scale"] else 0
        return (*parts["_packed"][:-1], columns)

    def part_shapes(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """The last word of a row, and of a column of zeros, may be filled in part."""
        *outer, rows, columns = shape
        per_word = WORD // self.bits
        groups = ceil_div(columns, self.group) if self.group else 1
        wanted: dict[str, tuple[Shape, ...]] = {
            "_packed": ((*outer, rows, ceil_div(columns, per_word)),),
            "_scale": ((*outer, rows, groups),),
            "_shape": ((len(shape),),),
        }
        if not self.symmetric:
            wanted["_zero_point"] = ((*outer, ceil_div(rows, per_word), groups),)
        return wanted

    def scales(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The one part that is scales."""
        return {"_scale": parts["_scale"].float()}

    def decode(self, parts: Mapping[str, torch.Tensor], first_row: int = 0) -> torch.Tensor:
        """Float32; codes and zeros are small integers, so only the product is rounded."""
        scales = parts["_scale"]
        group = self.group or parts["_packed"].shape[-1] * (WORD // self.bits)
        columns = scales.shape[-1] * group
        values = self._unpack(parts["_packed"])[..., :columns].float()
        if self.symmetric:
            values -= 2 ** (self.bits - 1)
        else:
            zeros = self._unpack(parts["_zero_point"].mT).mT[..., : scales.shape[-2], :]
            own = zeros[..., first_row : first_row + values.shape[-2], :]
            values.unflatten(-1, (-1, group)).sub_(own[..., None])
        return apply_scales(values, scales, (1, group), first_row)

    def _unpack(self, words: torch.Tensor) -> torch.Tensor:
        """The codes of int32 words, `[..., n]` -> `[..., n * codes in a word]`."""
        shifts = torch.arange(0, WORD, self.bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**self.bits - 1)).flatten(-2)
