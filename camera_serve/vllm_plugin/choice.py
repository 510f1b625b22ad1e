"""Which kernel computes a layer's experts on this machine."""

from importlib.util import find_spec

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from camera_serve.ragged.layer import RaggedLayer
from camera_serve.vllm_plugin import cpu_moe, torch_moe
from camera_serve.vllm_plugin.experts import Experts

logger = init_logger(__name__)


def pack(holder: nn.Module, rows: RaggedLayer, like: torch.Tensor, top_k: int) -> Experts:
    """Hand rows over to the fastest kernel there is; it holds them on `holder`, `rows` are used up.

    like: any tensor `[…, d_model]` of the activations' dtype and device; top_k: experts per token.
    Raises `KernelError` for rows the kernel cannot take, `KernelBuildError` without a compiler.
    """
    if reason := why_no_kernel(like.dtype):
        logger.warning_once("camera-serve: experts run in plain torch, slowly: %s", reason)
        return torch_moe.pack(holder, rows)
    if current_platform.is_cpu():
        return cpu_moe.pack(holder, rows)
    # Not at the top: without a GPU, Triton need not be there.
    from camera_serve.vllm_plugin import triton_moe

    experts = triton_moe.pack(holder, rows, like.dtype)
    x = like.new_zeros(_most_tokens(), like.shape[-1])
    triton_moe.compile_kernels(experts, x, top_k, rows.num_experts)
    return experts


def why_no_kernel(dtype: torch.dtype) -> str | None:
    """Why layers that compute in `dtype` have no fast kernel on this machine; None if they have."""
    if current_platform.is_cpu():
        if dtype == torch.bfloat16:
            return None
        return f"the CPU kernel computes in bfloat16, not {dtype}: serve with --dtype bfloat16"
    if not current_platform.is_cuda():
        return "there are kernels for CPUs and NVIDIA GPUs, and this is neither"
    if find_spec("triton") is None:
        return "the kernels for GPUs need Triton, which is not installed: pip install triton"
    return None


def why_no_cuda_graphs(dtype: torch.dtype) -> str | None:
    """Why a GPU's graphs cannot hold such layers; None if they can, or there is no GPU."""
    return why_no_kernel(dtype) if current_platform.is_cuda_alike() else None


def _most_tokens() -> int:
    """Tokens of the largest batch the engine will make."""
    return int(get_current_vllm_config().scheduler_config.max_num_batched_tokens)
