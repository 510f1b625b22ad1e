"""Registration with vLLM: repeatable, patches nothing, and says which versions it knows."""

import pytest
import vllm
from transformers import AutoConfig
from vllm.model_executor.layers.quantization import get_quantization_config

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import register, version_problem
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


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.32.0+cpu", "0.33.2rc1.dev5"])
def test_supported_versions(version: str) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_named_with_the_remedy(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None
    assert f"this is vLLM {version}" in problem
    assert "'vllm>=0.26,<0.34'" in problem


def test_an_unknown_vllm_refuses_our_checkpoints_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    register()
    refused = get_quantization_config("camera")
    with pytest.raises(ServingError, match=r"0\.26 to 0\.33.*this is vLLM 0\.34\.0"):
        refused.from_config({"quant_method": "camera"})
    assert refused.override_quantization_method({"quant_method": "fp8"}, None) is None
