"""The ragged MoE layer in Triton, for NVIDIA GPUs from Ampere on."""

from camera_serve.kernels.triton.layout import TritonLayer, TritonTier, pack_layer
from camera_serve.kernels.triton.moe import ragged_moe

__all__ = ["TritonLayer", "TritonTier", "pack_layer", "ragged_moe"]
