"""A tensor of a checkpoint: where it lies, what it is, and what it is decoded from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from camera_serve.models.formats import WeightFormat
from camera_serve.models.storage import Index

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Those of safetensors that are read. A checkpoint without codes holds floats and I32 alone, and
`COUNTED` in parts beside the model."""

COUNTED = ("I64", "BOOL")
"""Dtypes of positions and masks: no weight of a model is stored so, quantized or not."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is, from the safetensors header alone.

    It is `stored[index]` of the tensor named `stored` in `file`, or the transpose of that; all of
    it when `index` is empty. With a `coding` that tensor is decoded, and `dtype` is what comes out.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored: str
    index: Index = ()
    transposed: bool = False
    coding: "Coding | None" = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data, decoded."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor's data in the files, scales included."""
        if self.coding is None:
            return self.num_bytes
        whole = sum(part.num_bytes for part in self.coding.parts.values())
        return whole * torch.Size(self.shape).numel() // torch.Size(self.coding.shape).numel()


@dataclass(frozen=True)
class Coding:
    """How one weight of an original is stored: its format, its shape and its parts by suffix."""

    format: WeightFormat
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
