"""Registration with vLLM: repeatable, patches nothing, and leaves other models alone."""

import subprocess
import sys

import pytest
import vllm
from transformers import AutoConfig
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import register
from camera_serve.vllm_plugin.config import CameraConfig


@pytest.fixture(autouse=True)
def _registered_afterwards():
    yield
    register()


def test_vllm_knows_the_method_after_any_number_of_registrations() -> None:
    register()
    register()
    assert get_quantization_config("camera") is CameraConfig


def test_deepseek_v1_needs_no_remote_code() -> None:
    register()
    config = AutoConfig.for_model("deepseek", n_routed_experts=8)
    assert config.n_routed_experts == 8


def test_a_process_that_serves_another_model_pays_for_no_layers() -> None:
    script = """
import sys
from camera_serve.vllm_plugin import register
register()
heavy = ("transformers.models.llama.modeling_llama", "vllm.model_executor.layers.fused_moe")
print([name for name in heavy if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_a_vllm_that_is_too_old_refuses_our_checkpoints_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    register()
    refused = get_quantization_config("camera")
    with pytest.raises(ServingError, match=r"0\.26 and newer.*this is vLLM 0\.25\.1"):
        refused.from_config({"quant_method": "camera"})
    assert refused.override_quantization_method({"quant_method": "fp8"}, None) is None


def test_a_vllm_that_lacks_a_name_refuses_our_checkpoints_and_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.delitem(sys.modules, "camera_serve.vllm_plugin.config")
    monkeypatch.delattr(linear, "UnquantizedLinearMethod")
    register()
    refused = get_quantization_config("camera")
    with pytest.raises(ServingError, match=r"0\.99\.0.*UnquantizedLinearMethod.*Upgrade camera-"):
        refused.from_config({"quant_method": "camera"})


def test_a_newer_vllm_is_registered_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    register()
    assert get_quantization_config("camera") is CameraConfig


def test_other_models_are_asked_about_whatever_vllm_asks() -> None:
    asked = CameraConfig.override_quantization_method
    assert asked({"quant_method": "fp8"}, None, hf_config=None, novel=1) is None
    assert asked({"quant_method": "fp8"}, "fp8") is None
    assert asked({"quant_method": "camera"}, "camera") is None


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        ("camera", "bitsandbytes", "--quantization bitsandbytes: .* quantized by CAMERA already"),
        ("fp8", "camera", "--quantization camera: this checkpoint is quantized with fp8"),
    ],
)
def test_another_quantization_than_the_checkpoints_is_refused(
    stored: str, given: str, message: str
) -> None:
    with pytest.raises(ServingError, match=f"{message}.*start without --quantization"):
        CameraConfig.override_quantization_method({"quant_method": stored}, given)


def test_our_quantization_of_a_dense_model_is_refused() -> None:
    with pytest.raises(ServingError, match=r"^--quantization camera: .* compress the model first"):
        CameraConfig()
