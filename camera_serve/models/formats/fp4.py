"""FP4 of linear layers: two E2M1 numbers a byte, a scale for each 16 or 32 of a row.

NVFP4 of ModelOpt is `NAME` with `NAME_scale` (float8_e4m3fn) and `NAME_scale_2` (a factor for the
whole matrix); compressed-tensors calls them `NAME_packed`, `NAME_scale` and `NAME_global_scale`,
which is that factor's inverse. MXFP4 of compressed-tensors has exponents for scales and no factor.
As in vLLM `quantization/utils/nvfp4_emulation_utils.py`, `dequantize_to_dtype`, and
compressed-tensors `compressors/{nvfp4,mxfp4}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from camera_serve.models.formats.base import Shape, apply_scales, ceil_div, decode_fp4, exponents


@dataclass(frozen=True)
class Fp4:
    """`number[i, j] * scale[i, j // group] * factor`.

    codes, factor: their suffixes, "" for no factor; inverse: the factor is to be divided by.
    """

    codes: str
    group: int
    factor: str = ""
    inverse: bool = False

    @property
    def title(self) -> str:
        """The format in words."""
        return "NVFP4" if self.factor else "MXFP4 in linear layers"

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """Scales are float8_e4m3fn beside a factor, exponents without."""
        if not self.factor:
            return {self.codes: ("U8",), "_scale": ("U8", "F8_E8M0")}
        return {self.codes: ("U8",), "_scale": ("F8_E4M3",), self.factor: ("F32",)}

    @property
    def zero_scales(self) -> tuple[str, ...]:
        """The scale of a group whose weights are all tiny is 0 in float8_e4m3fn."""
        return ("_scale",) if self.factor else ()

    def shape(self, parts: Mapping[str, Shape]) -> Shape:
        """Twice the columns of the codes."""
        *rows, half = parts[self.codes]
        return (*rows, 2 * half)

    def part_shapes(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """One scale per group; the factor is one number, or one for each of fused experts."""
        *rows, columns = shape
        factors = ((), (1,)) if len(shape) == 2 else ((), (1,), shape[:1], (*shape[:1], 1))
        scales = {"_scale": ((*rows, ceil_div(columns, self.group)),)}
        return scales | ({self.factor: factors} if self.factor else {})

    def scales(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the groups, and the factor."""
        if not self.factor:
            return {"_scale": exponents(parts["_scale"])}
        return {name: parts[name].float() for name in ("_scale", self.factor)}

    def decode(self, parts: Mapping[str, torch.Tensor], first_row: int = 0) -> torch.Tensor:
        """Float32: the scales take the factor first, as in vLLM."""
        scales = parts["_scale"]
        if self.factor:
            factor = parts[self.factor]
            scales = scales / factor if self.inverse else scales * factor
        values = decode_fp4(parts[self.codes])
        return apply_scales(values, scales, (1, self.group), first_row)
