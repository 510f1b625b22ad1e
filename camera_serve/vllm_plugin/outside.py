"""Linear layers outside the experts that are stored in FP8: vLLM's own method `fp8` serves them."""

from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from camera_serve.checkpoint.format import OutsideExperts

MERGED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Layers of vLLM's that are several of the checkpoint's. Its models tell a quantization config of
theirs, but those of Qwen only after the config has taken note."""


def outside_method(outside: OutsideExperts) -> Fp8Config:
    """vLLM's settings of FP8 weights and of activations that it quantizes itself.

    It is asked for the methods of layers alone, and only of those in `outside.modules`.
    """
    block = outside.weight_block_size
    return Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=list(block) if block else None,
    )
