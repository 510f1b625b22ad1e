"""Linear layers outside the experts that are stored in FP8: vLLM's own method `fp8` serves them."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from camera_serve.checkpoint.format import OutsideExperts
from camera_serve.errors import ServingError, first_line

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


def kept_method(fp8: Fp8Config, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
    """vLLM's method of one layer; `ServingError` where this device has no kernel for it."""
    method = fp8.get_quant_method(layer, prefix)
    assert method is not None, "vLLM's fp8 has a method for every linear layer"
    create = method.create_weights

    def create_or_say(layer: torch.nn.Module, *arguments: Any, **keywords: Any) -> None:
        try:
            create(layer, *arguments, **keywords)
        except ValueError as error:
            raise ServingError(
                f"{prefix} is stored in FP8, and vLLM cannot compute that on this device "
                f"({first_line(error)}): serve on a GPU, or a CPU with AMX, or compress the "
                "original again without --keep-fp8"
            ) from error

    method.create_weights = create_or_say
    return method
