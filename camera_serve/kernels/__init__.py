"""Ragged MoE layers: the plain-torch reference that every faster kernel is tested against."""

from camera_serve.kernels.reference import (
    PackedRows,
    RaggedLayer,
    RaggedTier,
    dense_rows,
    micro_experts,
    ragged_moe,
)

__all__ = [
    "PackedRows",
    "RaggedLayer",
    "RaggedTier",
    "dense_rows",
    "micro_experts",
    "ragged_moe",
]
