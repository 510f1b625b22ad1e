"""The ragged MoE layer in C++: bf16 activations, tiers of 16, 8, 4, 3, 2 and 1 bits."""

from camera_serve.kernels.cpu.layer import (
    CpuLayer,
    CpuTier,
    activations,
    isa,
    pack_layer,
    ragged_moe,
    use_activations,
    use_isa,
)

__all__ = [
    "CpuLayer",
    "CpuTier",
    "activations",
    "isa",
    "pack_layer",
    "ragged_moe",
    "use_activations",
    "use_isa",
]
