"""Which layers vLLM's own FP8 method gets, and whether what it allocates is what is stored."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.transformers_utils.config import get_config

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError, ServingError
from camera_serve.vllm_plugin import loading, register
from camera_serve.vllm_plugin.config import CameraConfig
from camera_serve.vllm_plugin.linear import SharedDownMethod, SharedGateUpMethod
from tests.editing import edit_config
from tests.keep_fp8 import PER_TENSOR, outputs
from tests.originals import FP8_BLOCKS

LAYER = "model.layers.1"
FUSED = {
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""Layers of vLLM's DeepSeek-V3 that are two of the checkpoint's."""


@pytest.fixture(scope="module", params=["blocks", "per tensor"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    way = FP8_BLOCKS if request.param == "blocks" else PER_TENSOR
    # So that q_a and gate end with a whole block, as they do in published models.
    sizes = {"hidden_size": 192, "q_lora_rank": 128, "intermediate_size": 256}
    return outputs("deepseek_v3", tmp_path_factory.mktemp("outside"), way, **sizes)


@pytest.fixture
def config(pair: tuple[Path, Path]) -> CameraConfig:
    return opened(pair[0])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in path.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def opened(path: Path) -> CameraConfig:
    register()
    hf_config = get_config(path, trust_remote_code=False)
    config = CameraConfig.from_config(hf_config.quantization_config)
    config.maybe_update_config(str(path), hf_config=hf_config, revision=None)
    return config


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    # vLLM has no kernel for blocks on a CPU without AMX: what is allocated does not depend on it.
    monkeypatch.setattr(vllm_fp8, "init_fp8_linear_kernel", lambda **_: None)
    settings = VllmConfig()
    settings.model_config = SimpleNamespace(dtype=torch.bfloat16, quantization_config=None)  # type: ignore[assignment]
    with set_current_vllm_config(settings):
        yield


class Linear(LinearBase):
    """A linear layer as vLLM asks about it, without what its constructor needs of an engine."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.tp_size = 1


def method(config: CameraConfig, prefix: str) -> Any:
    return config.get_quant_method(Linear(), prefix)


@pytest.mark.parametrize(
    "prefix",
    [
        f"{LAYER}.self_attn.fused_qkv_a_proj",
        f"{LAYER}.self_attn.q_b_proj",
        f"{LAYER}.self_attn.kv_b_proj",
        f"{LAYER}.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ],
)
def test_layers_that_are_stored_in_fp8_get_vllms_own_method(
    config: CameraConfig, prefix: str
) -> None:
    found = method(config, prefix)
    assert type(found) is Fp8LinearMethod
    assert not found.act_q_static


@pytest.mark.parametrize(
    "prefix",
    [
        f"{LAYER}.mlp.gate",
        "lm_head",
        "model.layers.3.eh_proj",
        "model.layers.3.self_attn.o_proj",
        "model.layers.3.mlp.shared_experts.gate_up_proj",
        "model.layers.11.self_attn.o_proj",
        "",
    ],
)
def test_others_and_draft_layers_are_not_quantized(config: CameraConfig, prefix: str) -> None:
    assert type(method(config, prefix)) is UnquantizedLinearMethod


def test_shared_experts_stay_ours(config: CameraConfig) -> None:
    shared = f"{LAYER}.mlp.shared_experts"
    assert type(method(config, f"{shared}.gate_up_proj")) is SharedGateUpMethod
    assert type(method(config, f"{shared}.down_proj")) is SharedDownMethod


def test_layers_that_are_no_linear_ones_are_left_to_vllm(config: CameraConfig) -> None:
    assert config.get_quant_method(torch.nn.Module(), "model.embed_tokens") is None


def test_an_output_in_16_bits_has_no_fp8_layer(pair: tuple[Path, Path]) -> None:
    config = opened(pair[1])
    assert type(method(config, f"{LAYER}.self_attn.o_proj")) is UnquantizedLinearMethod
    assert torch.float32 in config.get_supported_act_dtypes()


def test_dtypes_are_those_that_both_compute_in(config: CameraConfig) -> None:
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16]


def test_the_config_travels_to_workers(config: CameraConfig) -> None:
    copy = pickle.loads(pickle.dumps(config))
    assert type(method(copy, f"{LAYER}.self_attn.o_proj")) is Fp8LinearMethod


LAYERS = {
    f"{LAYER}.self_attn": ("fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj"),
    "model.layers.0.mlp": ("gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize("module", LAYERS)
def test_what_vllm_allocates_is_what_is_stored(
    pair: tuple[Path, Path], config: CameraConfig, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("rank", 0), ("world_size", 1)):
        function = f"get_tensor_model_parallel_{name}"
        monkeypatch.setattr(f"vllm.model_executor.parameter.{function}", lambda v=value: v)
        monkeypatch.setattr(f"vllm.distributed.{function}", lambda v=value: v)
    stored = tensors(pair[0])
    assert config.quantization.outside_experts
    parts = ("weight", f"weight{config.quantization.outside_experts.scale}")
    for name in LAYERS[module]:
        members = FUSED.get(name, [name])
        weights = [stored[f"{module}.{member}.weight"] for member in members]
        rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
        layer, sizes = Linear(), (columns, rows, columns, sum(rows))
        found = method(config, f"{module}.{name}")
        found.create_weights(layer, *sizes, torch.bfloat16, weight_loader=lambda *_: None)
        assert dict(layer.named_parameters()).keys() == set(parts)
        for part in parts:
            wanted = torch.cat([stored[f"{module}.{member}.{part}"] for member in members])
            parameter = layer.get_parameter(part)
            assert (parameter.shape, parameter.dtype) == (wanted.shape, wanted.dtype), part


def test_one_layer_of_two_kinds_is_refused(config: CameraConfig) -> None:
    outside = config.quantization.outside_experts
    assert outside
    modules = tuple(m for m in outside.modules if not m.endswith("layers.0.mlp.up_proj"))
    half = outside.model_copy(update={"modules": modules})
    config.quantization = config.quantization.model_copy(update={"outside_experts": half})
    with pytest.raises(ServingError, match=r"gate_proj is stored in FP8, .*up_proj in 16 bits"):
        method(config, "model.layers.0.mlp.gate_up_proj")


def test_a_model_on_the_hub_is_checked_with_its_scales(pair: tuple[Path, Path]) -> None:
    checkpoint = Checkpoint.open(pair[0])
    assert checkpoint.quantization and checkpoint.quantization.outside_experts
    arguments = (checkpoint.config, checkpoint.structure, checkpoint.quantization)
    found = {name: tuple(tensor.shape) for name, tensor in tensors(pair[0]).items()}
    loading.check_hub_model("org/name", *arguments, found)
    scale = f"{LAYER}.self_attn.o_proj.weight{checkpoint.quantization.outside_experts.scale}"
    with pytest.raises(CheckpointError, match=f"{scale} .* is missing"):
        without = {name: shape for name, shape in found.items() if name != scale}
        loading.check_hub_model("org/name", *arguments, without)


def test_a_folder_that_lost_a_scale_is_not_served(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for file in pair[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def another(config: dict[str, Any]) -> None:
        config["quantization_config"]["outside_experts"]["modules"].append(f"{LAYER}.mlp.gate")

    edit_config(tmp_path, another)
    with pytest.raises(CheckpointError, match=f"{LAYER}.mlp.gate.weight"):
        opened(tmp_path)


def test_a_device_without_a_kernel_for_fp8_is_told_what_to_do(
    config: CameraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(**_: Any) -> None:
        raise ValueError("Failed to find a kernel that can implement the layer. Reasons: no AMX")

    monkeypatch.setattr(vllm_fp8, "init_fp8_linear_kernel", no_kernel)
    for name, value in (("rank", 0), ("world_size", 1)):
        function = f"get_tensor_model_parallel_{name}"
        monkeypatch.setattr(f"vllm.model_executor.parameter.{function}", lambda v=value: v)
        monkeypatch.setattr(f"vllm.distributed.{function}", lambda v=value: v)
    prefix = f"{LAYER}.self_attn.o_proj"
    with pytest.raises(ServingError, match=rf"^{prefix} is .*again without --keep-fp8"):
        method(config, prefix).create_weights(
            Linear(), 128, [128], 128, 128, torch.bfloat16, weight_loader=None
        )
