"""Ragged MoE layers: the plain-torch reference that every faster kernel is tested against."""

from camera_serve.kernels.reference import RaggedLayer, ragged_moe

__all__ = ["RaggedLayer", "ragged_moe"]
