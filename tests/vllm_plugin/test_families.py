"""A checkpoint of every family, up to one layer that vLLM would build and load."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.registry import _VLLM_MODELS

from camera_serve.models import MoeStructure
from camera_serve.vllm_plugin.config import CameraConfig
from tests import pruning, tiny_models
from tests.vllm_plugin.experts import moe_config
from tests.vllm_plugin.test_config import open_as_vllm_does

OTHER_NAMES = {"minimax_m2": "model.layers.{}.mlp"}
"""What vLLM calls a MoE layer where it is not the checkpoint's name."""

SHARDS = ("w1", "w3", "w2")
TOP_K = 3


def opened_as_by_vllm(path: Path) -> CameraConfig:
    """What vLLM has when it starts to build the model."""
    config = open_as_vllm_does(path)
    (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
    module, name = _VLLM_MODELS[architecture]
    try:
        found = import_module(module if "." in module else f"vllm.model_executor.models.{module}")
    except ModuleNotFoundError as error:
        assert error.name == "torchvision"
        pytest.skip("vLLM's model sees pictures with torchvision: tests/e2e serves it")
    if mapper := getattr(getattr(found, name), "hf_to_vllm_mapper", None):
        config.apply_vllm_mapper(mapper)
    return config


def routed_experts(num_experts: int) -> Any:
    """vLLM's layer, with what the method asks of it."""
    layer: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.moe_config = moe_config()
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.global_num_experts = num_experts
    layer._map_global_expert_id_to_local_expert_id = int
    return layer


def load(layer: Any, structure: MoeStructure, number: int, path: Path) -> None:
    """Call the loaders with every expert tensor of a layer, as vLLM's models do."""
    tensors = load_file(path / "model.safetensors")
    for expert in range(structure.num_experts):
        for shard, projection in zip(SHARDS, structure.family.projections, strict=True):
            name = f"{structure.moe_prefix(number)}.experts.{expert}.{projection}.weight"
            if name in tensors:
                param = layer.w2_weight if shard == "w2" else layer.w13_weight
                assert param.weight_loader(
                    param, tensors[name], "w", shard_id=shard, expert_id=expert, return_success=True
                )


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@torch.no_grad()
def test_the_experts_of_a_layer_compute_what_those_of_transformers_do(
    family: str, tmp_path: Path
) -> None:
    dense = tiny_models.save(family, tmp_path / "dense", dtype=torch.float32)
    path = tmp_path / "pruned"
    kept = pruning.prune(dense, path)
    structure = pruning.structure_of(dense)
    number = structure.moe_layers[-1]
    served = OTHER_NAMES.get(family, structure.moe_prefix(number)).format(number)
    layer = routed_experts(structure.num_experts)
    config = opened_as_by_vllm(path)
    with set_current_vllm_config(VllmConfig()):
        method: Any = config.get_quant_method(layer, f"{served}.experts")
        layer.quant_method = method
        method.create_weights(layer, structure.num_experts, structure.d_model, 1, torch.float32)
        load(layer, structure, number, path)
        method.process_weights_after_loading(layer)
    x = torch.randn(20, structure.d_model)
    ids = torch.rand(len(x), structure.num_experts).topk(TOP_K).indices
    weights = torch.rand(len(x), TOP_K)
    experts: Any = pruning.zeroed(dense, kept).get_submodule(structure.moe_module(number)).experts
    found = method.apply(layer, x, weights, ids.int(), None, None)
    # Sums of up to 64 float32 products in another order.
    torch.testing.assert_close(found, experts(x, ids, weights), rtol=1e-4, atol=1e-4)
