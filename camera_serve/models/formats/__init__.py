"""The tensors that a quantized original stores for one weight go in; that weight comes out."""

from camera_serve.models.formats.base import FLOATS, WeightFormat
from camera_serve.models.formats.fp4 import Fp4
from camera_serve.models.formats.fp8 import Fp8
from camera_serve.models.formats.mxfp4 import Mxfp4
from camera_serve.models.formats.packed_int import PackedInt

__all__ = ["FLOATS", "Fp4", "Fp8", "Mxfp4", "PackedInt", "WeightFormat"]
