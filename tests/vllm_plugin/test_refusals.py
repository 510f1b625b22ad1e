"""vLLM's flags that a CAMERA checkpoint cannot be served with: named, with the remedy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import choice
from camera_serve.vllm_plugin.refusals import LOAD_FORMATS, refuse_settings
from tests.vllm_plugin.experts import camera_config

TENSOR_BY_TENSOR = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor"}


@pytest.fixture
def settings() -> VllmConfig:
    config = VllmConfig()
    config.model_config = SimpleNamespace(quantization_config=None, dtype=torch.float16)
    return config


def refusal(settings: VllmConfig) -> str:
    with pytest.raises(ServingError) as caught:
        refuse_settings(settings)
    return str(caught.value)


def test_what_vllm_does_by_itself_is_served(settings: VllmConfig) -> None:
    refuse_settings(settings)


@pytest.mark.parametrize("load_format", [*_LOAD_FORMAT_TO_MODEL_LOADER, "gguf", "bitsandbytes"])
def test_every_load_format_is_read_tensor_by_tensor_or_refused(
    load_format: str, settings: VllmConfig
) -> None:
    settings.load_config.load_format = load_format
    if load_format in {*TENSOR_BY_TENSOR, "runai_streamer", "dummy"}:
        refuse_settings(settings)
        return
    message = refusal(settings)
    assert message.startswith(f"--load-format {load_format}: ")
    assert message.endswith(f"use one of {', '.join(LOAD_FORMATS)}")


FLAGS: dict[str, Callable[[Any], object]] = {
    "--quantization-config": lambda c: setattr(c.model_config, "quantization_config", {"moe": "x"}),
    "--cpu-offload-gb": lambda c: setattr(c.offload_config.uva, "cpu_offload_gb", 1.0),
    "--offload-group-size": lambda c: setattr(c.offload_config.prefetch, "offload_group_size", 2),
    "--weight-transfer-config": lambda c: setattr(c, "weight_transfer_config", SimpleNamespace()),
    "--enable-eplb": lambda c: setattr(c.parallel_config, "enable_eplb", True),
    "--enable-lora": lambda c: setattr(c, "lora_config", SimpleNamespace()),
    "--moe-backend triton": lambda c: setattr(c.kernel_config, "moe_backend", "triton"),
    "--all2all-backend deepep_v2": lambda c: (
        setattr(c.parallel_config, "data_parallel_size", 2),
        setattr(c.parallel_config, "all2all_backend", "deepep_v2"),
    ),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_for_experts_of_equal_width_are_refused(flag: str, settings: VllmConfig) -> None:
    FLAGS[flag](settings)
    message = refusal(settings)
    assert message.startswith(flag)
    assert "start with" in message


def test_the_default_way_to_exchange_tokens_is_served(settings: VllmConfig) -> None:
    settings.parallel_config.data_parallel_size = 2
    refuse_settings(settings)


def test_refused_before_the_first_layer_has_weights(settings: VllmConfig) -> None:
    config = camera_config()
    with set_current_vllm_config(settings):
        assert config.get_quant_method(nn.Module(), "model.embed_tokens") is None
        settings.load_config.load_format = "sharded_state"
        with pytest.raises(ServingError, match="--load-format sharded_state"):
            config.get_quant_method(nn.Module(), "model.embed_tokens")


def layer_of(kind: type[nn.Module]) -> Any:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("prefix", ["model.layers.7.mlp", "model.layers.0.block_sparse_moe"])
def test_a_layer_that_the_layout_does_not_list_is_named(settings: VllmConfig, prefix: str) -> None:
    """Of another implementation of the model, or when nobody has looked at the checkpoint."""
    with (
        set_current_vllm_config(settings),
        pytest.raises(
            ServingError, match=rf"'{prefix}', which quantization_config .*Start without"
        ),
    ):
        camera_config().get_quant_method(layer_of(RoutedExperts), f"{prefix}.experts")


def test_a_shared_expert_of_other_layers_is_named(settings: VllmConfig) -> None:
    config = camera_config()
    name = "model.layers.0.mlp.shared_expert.gate_proj"
    with (
        set_current_vllm_config(settings),
        pytest.raises(ServingError, match=f"{name}, a ReplicatedLinear, wanted gate_up_proj"),
    ):
        config.get_quant_method(layer_of(ReplicatedLinear), name)


class Gpu:
    """A platform of vLLM's with a GPU: an NVIDIA one, or another that torch calls CUDA as well."""

    def __init__(self, *, nvidia: bool) -> None:
        self.nvidia = nvidia

    def is_cpu(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return True

    def is_cuda(self) -> bool:
        return self.nvidia


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_cuda_graphs_are_taken_where_the_kernel_is(
    mode: CUDAGraphMode, settings: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "current_platform", Gpu(nvidia=True))
    settings.compilation_config.cudagraph_mode = mode
    refuse_settings(settings)


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
@pytest.mark.parametrize("lacking", ["an NVIDIA GPU", "Triton"])
def test_cuda_graphs_are_refused_with_the_remedy_where_it_is_not(
    lacking: str,
    mode: CUDAGraphMode,
    settings: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "current_platform", Gpu(nvidia=lacking == "Triton"))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    settings.compilation_config.cudagraph_mode = mode
    if mode == CUDAGraphMode.NONE:
        refuse_settings(settings)
        return
    reason = {"Triton": "Triton, which is not installed", "an NVIDIA GPU": "NVIDIA GPUs, and this"}
    with pytest.raises(ServingError, match=f"{reason[lacking]}.*start with --enforce-eager"):
        refuse_settings(settings)
