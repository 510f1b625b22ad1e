"""FP8: float8_e4m3fn codes; a scale for each block, each row, or the whole matrix.

Blocks of 128×128 are those of DeepSeek-V3: `NAME_scale_inv` is a factor, whatever its name
says (transformers `integrations/finegrained_fp8.py`, `Fp8Dequantize`). One scale, or one per row,
is what `quant_method: fp8` without blocks, compressed-tensors and ModelOpt write.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from camera_serve.models.formats.base import FLOATS, Shape, apply_scales, ceil_div


@dataclass(frozen=True)
class Fp8:
    """`code[i, j] * scale[i // block[0], j // block[1]]`; block None: one scale, or one per row.

    scale: the suffix of the scales.
    """

    scale: str
    block: tuple[int, int] | None

    @property
    def title(self) -> str:
        """The format in words."""
        if self.block is None:
            return "FP8 with a scale per matrix or row"
        return f"FP8 in blocks of {self.block[0]}×{self.block[1]}"

    @property
    def codes(self) -> str:
        """The codes have the weight's own name."""
        return ""

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """Codes in float8_e4m3fn, scales in floats or powers of two."""
        return {"": ("F8_E4M3",), self.scale: (*FLOATS, "F8_E8M0")}

    @property
    def zero_scales(self) -> tuple[str, ...]:
        """None may be 0."""
        return ()

    def shape(self, parts: Mapping[str, Shape]) -> Shape:
        """That of the codes."""
        return parts[""]

    def part_shapes(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """A grid of scales; without blocks any of the ways to write one, or one per row."""
        *outer, rows, columns = shape
        if self.block is not None:
            height, width = self.block
            return {self.scale: ((*outer, ceil_div(rows, height), ceil_div(columns, width)),)}
        grids = ((*outer, 1, 1), (*outer, rows, 1))
        return {self.scale: grids if outer else (*grids, (), (1,), (rows,))}

    def scales(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The one part that is scales."""
        return {self.scale: parts[self.scale].float()}

    def decode(self, parts: Mapping[str, torch.Tensor], first_row: int = 0) -> torch.Tensor:
        """Float32, as in transformers and compressed-tensors: rounded once by the product."""
        values, scales = parts[""].float(), parts[self.scale]
        if self.block is not None:
            return apply_scales(values, scales, self.block, first_row)
        grid = scales if scales.dim() > 1 else scales.reshape(-1, 1)
        height = 1 if grid.shape[-2] > 1 else first_row + values.shape[-2]
        return apply_scales(values, grid, (height, values.shape[-1]), first_row)
