"""Registration with vLLM: repeatable, patches nothing, and says which versions it knows."""

import pytest
import vllm
from transformers import AutoConfig
from vllm.model_executor.layers.quantization import get_quantization_config

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import contract, register, version_problem
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


@pytest.mark.parametrize("version", ["0.25.1", "0.9.2", "dev"])
def test_other_versions_are_named_with_the_remedy(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None
    assert f"this is vLLM {version}" in problem
    assert "'vllm>=0.26,<0.34'" in problem


def test_an_old_vllm_refuses_our_checkpoints_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.25.0")
    register()
    refused = get_quantization_config("camera")
    with pytest.raises(ServingError, match=r"0\.26 and newer.*this is vLLM 0\.25\.0"):
        refused.from_config({"quant_method": "camera"})
    assert refused.override_quantization_method({"quant_method": "fp8"}, None) is None


@pytest.mark.parametrize("version", ["0.34.0", "0.35.1.dev3+cpu", "1.0.0"])
def test_a_newer_vllm_that_keeps_the_contract_serves_with_a_warning(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    register()
    assert get_quantization_config("camera") is CameraConfig
    assert f"up to 0.33, and this is {version}" in caplog.text


def test_a_newer_vllm_that_breaks_the_contract_is_refused_with_what_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(contract, "broken_items", lambda: iter(["x has no y"]))
    register()
    wanted = r"vLLM 0\.34\.0 is newer .* x has no y\. Update camera-serve, or install 'vllm>=0\.26"
    with pytest.raises(ServingError, match=wanted):
        get_quantization_config("camera").from_config({"quant_method": "camera"})


def test_a_plugin_that_does_not_import_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("cannot import name 'Gone'")

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(contract, "broken_items", fail)
    problem = version_problem("0.34.0")
    assert problem is not None and "does not load (ImportError: cannot import name" in problem
