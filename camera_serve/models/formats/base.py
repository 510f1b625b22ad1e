"""What all formats share: codes stand for numbers, and a block of them shares a scale."""

from collections.abc import Mapping
from typing import Protocol

import torch

Shape = tuple[int, ...]

FLOATS = ("BF16", "F16", "F32", "F64")
"""The dtypes of safetensors that hold weights as they are; scales may have them too."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the four-bit floats 0 to 7 stand for; 8 to 15 are their negatives (OCP MX 1.0, 5.3.3)."""


class WeightFormat(Protocol):
    """How a weight NAME is stored: as tensors called NAME and a suffix, its parts.

    A weight is a matrix `[rows, columns]`, or several of them, `[experts, rows, columns]`.
    """

    @property
    def title(self) -> str:
        """The format in words."""

    @property
    def codes(self) -> str:
        """The part that holds a code for each weight, row by row."""

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """All parts, each with the dtypes it may be stored in."""

    @property
    def zero_scales(self) -> tuple[str, ...]:
        """The scales that may be 0; no other may, and none may be negative, NaN or Inf."""

    def shape(self, parts: Mapping[str, Shape]) -> Shape:
        """The shape of the weight, from its parts'; they need not fit each other."""

    def part_shapes(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """The shapes each part of a weight may have."""

    def scales(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts that are scales, in float32."""

    def decode(self, parts: Mapping[str, torch.Tensor], first_row: int = 0) -> torch.Tensor:
        """The weight in float32; `parts` are as stored, but for its `scales`.

        The codes may be those of some rows only, from `first_row` on.
        """


def apply_scales(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first_row: int = 0
) -> torch.Tensor:
    """Multiply each block of `values` by its scale, in place, and return them.

    values: float32 `[..., rows, columns]`, from row `first_row` of the whole weight on; scales:
    float32 `[..., ⌈all rows / block[0]⌉, ⌈columns / block[1]⌉]`. Blocks at the edges are cut off.
    """
    rows, columns = values.shape[-2:]
    height, width = block
    own = scales[..., torch.arange(first_row, first_row + rows) // height, :]
    blocks = columns // width
    inner, edge = values.split([blocks * width, columns - blocks * width], dim=-1)
    inner.unflatten(-1, (blocks, width)).mul_(own[..., :blocks, None])
    edge.mul_(own[..., blocks:])
    return values


def decode_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Two E2M1 numbers of each byte, the low four bits first: uint8 `[..., n]` -> `[..., 2n]`."""
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=-1)
    return pairs[codes.int()].flatten(-2)


def exponents(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 scales, stored as bytes or as float8_e8m0fnu, in float32; the byte 255 is NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover `size`, the last of them perhaps in part."""
    return -(-size // block)
