"""The layers ragged ones are compared with, by calling vLLM's kernels on tensors directly."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from bench.gpu.random_layers import DTYPE, GROUP_SIZE, Tokens, random_tokens
from bench.shapes.published import Shape
from camera_serve.errors import first_line

HUMMING_BITS = (2, 3, 4)

Call = Callable[[Tokens], torch.Tensor]
Key = TypeVar("Key")


@contextmanager
def vllm_context() -> Iterator[None]:
    """vLLM's kernels ask for a configuration, and modular ones for a workspace."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.workspace import init_workspace_manager

    with set_current_vllm_config(VllmConfig()):
        init_workspace_manager(torch.device("cuda", torch.cuda.current_device()))
        yield


def dense_layers(shape: Shape, w13: torch.Tensor, w2: torch.Tensor) -> dict[str, Call]:
    """vLLM's Triton kernel on w13 `[E, 2·d_ff, d_model]`, w2 `[E, d_model, d_ff]`, and the backend
    vLLM itself would choose here, where that is another one.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def triton(tokens: Tokens) -> torch.Tensor:
        return fused_experts(tokens.x, w13, w2, tokens.weights, tokens.ids)

    chosen = tried("vLLM's choice", shape, w13.device, lambda: _chosen_backend(shape, w13, w2))
    return {"vllm-triton": triton} | chosen


def _chosen_backend(shape: Shape, w13: torch.Tensor, w2: torch.Tensor) -> dict[str, Call]:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    config = moe_config(shape, w13.device)
    backend, experts = unquantized.select_unquantized_moe_backend(config)
    # One that routes by itself takes router logits, which the others do not.
    if backend.name == "TRITON" or experts is None or experts.is_monolithic():
        return {}
    # Some backends reorder weights where they lie, and others compute with the same.
    w1, w2 = unquantized.convert_to_unquantized_kernel_format(
        backend, moe_config=config, w13_weight=w13.clone(), w2_weight=w2.clone()
    )
    kernel = unquantized.make_unquantized_moe_kernel(
        FusedMoEQuantConfig.make(), config, backend, experts
    )

    def call(tokens: Tokens) -> torch.Tensor:
        return kernel.apply(
            hidden_states=tokens.x,
            w1=w1,
            w2=w2,
            topk_weights=tokens.weights,
            topk_ids=tokens.ids,
            activation=MoEActivation.SILU,
            global_num_experts=shape.num_experts,
            expert_map=None,
            apply_router_weight_on_input=False,
        )

    return {f"vllm-{backend.name.lower().replace('_', '-')}": call}


def moe_config(shape: Shape, device: torch.device) -> Any:
    """vLLM's description of the layer on one GPU."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    return FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.num_experts,
        num_logical_experts=shape.num_experts,
        activation=MoEActivation.SILU,
        device=device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=DTYPE,
    )


def tried(
    name: str, shape: Shape, device: torch.device, make: Callable[[], dict[Key, Call]]
) -> dict[Key, Call]:
    """What `make` gives, called once; nothing, and why on stderr, where vLLM cannot do it here.

    vLLM has these layers by other names, or not at all, in other versions and on other GPUs: the
    rest is measured all the same.
    """
    try:
        found = make()
        for call in found.values():
            call(random_tokens(shape, 4, 0, device, balanced=True))
        if device.type == "cuda":
            # What fails on the GPU is known by then only.
            torch.cuda.synchronize(device)
        return found
    except Exception as error:
        print(f"left out: {name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return {}


def humming_layers(shape: Shape, device: torch.device) -> dict[int, Call]:
    """vLLM's Humming experts by bits, each of `HUMMING_BITS`, where Humming is installed."""
    from vllm.utils.import_utils import has_humming

    found: dict[int, Call] = {}
    for bits in HUMMING_BITS if has_humming() else ():

        def make(bits: int = bits) -> dict[int, Call]:
            return {bits: humming_layer(shape, bits, device)}

        found |= tried(f"humming {bits} bits", shape, device, make)
    return found


def humming_layer(shape: Shape, bits: int, device: torch.device) -> Call:
    """vLLM's Humming experts at `bits` throughout, random codes, groups of 128."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization import humming

    schema = {
        "quant_method": "humming",
        "b_dtype": f"uint{bits}",
        "weight_scale_group_size": GROUP_SIZE,
    }
    quantization = humming.HummingLayerQuantizationConfig.from_config(schema)
    config = moe_config(shape, device)
    method = humming.HummingMoEMethod(quantization, config)
    layer: Any = nn.Module()
    layer.activation = MoEActivation.SILU
    layer.moe_config = config
    layer.params_dtype = DTYPE
    layer.layer_name = "experts"
    layer.hidden_size = shape.d_model
    layer.intermediate_size_per_partition = shape.d_ff
    layer.local_num_experts = shape.num_experts
    layer.global_num_experts = shape.num_experts
    layer.expert_map = None
    layer._expert_routing_tables = lambda: None
    with torch.device(device):
        method.create_weights(layer, shape.num_experts, shape.d_model, shape.d_ff, DTYPE)
    for parameter in layer.parameters():
        if parameter.dtype == torch.int32:
            parameter.data.random_(-(2**31), 2**31)
        else:
            parameter.data.fill_(shape.d_model**-0.5)
    method.process_weights_after_loading(layer)
    return lambda tokens: method.apply(layer, tokens.x, tokens.weights, tokens.ids, None, None)
