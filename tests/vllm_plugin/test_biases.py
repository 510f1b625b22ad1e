"""A bias that vLLM's model has no place for stops the server: vLLM itself would leave it out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from camera_serve.errors import ServingError
from tests import pruning, tiny_models
from tests.vllm_plugin.test_config import open_as_vllm_does
from tests.vllm_plugin.test_refusals import layer_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its q_proj, k_proj and v_proj have biases, and no other layer has."""
    dense = tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("biases") / "dense")
    pruning.prune(dense, dense.with_name("pruned"))
    return dense.with_name("pruned")


def method(
    checkpoint: Path, prefix: str, mapper: WeightsMapper | None = None
) -> QuantizeMethodBase:
    config = open_as_vllm_does(checkpoint)
    if mapper:
        config.apply_vllm_mapper(mapper)
    engine = VllmConfig()
    engine.model_config = SimpleNamespace(quantization_config=None, dtype=None)
    with set_current_vllm_config(engine):
        found = config.get_quant_method(layer_of(RowParallelLinear), prefix)
    assert found is not None
    return found


def linear(bias: bool) -> nn.Module:
    return nn.Linear(2, 2, bias=bias)


@pytest.mark.parametrize("name", ["q_proj", "qkv_proj"])
def test_a_layer_without_the_bias_that_is_stored_is_refused_once_loaded(
    checkpoint: Path, name: str
) -> None:
    found = method(checkpoint, f"model.layers.1.self_attn.{name}")
    with pytest.raises(ServingError, match=r"layers\.1\.self_attn\.[kq]_proj\.bias is in the chec"):
        found.process_weights_after_loading(linear(bias=False))


def test_a_layer_is_known_by_the_name_that_vllm_gives_it(checkpoint: Path) -> None:
    nested = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    found = method(checkpoint, "language_model.model.layers.0.self_attn.qkv_proj", nested)
    with pytest.raises(ServingError, match=r"^model\.layers\.0\.self_attn\.k_proj\.bias is"):
        found.process_weights_after_loading(linear(bias=False))


@pytest.mark.parametrize(("name", "bias"), [("qkv_proj", True), ("o_proj", False)])
def test_a_layer_with_what_is_stored_is_processed_as_vllm_does(
    checkpoint: Path, name: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed = []
    theirs = "vllm.model_executor.layers.linear.UnquantizedLinearMethod"
    monkeypatch.setattr(
        f"{theirs}.process_weights_after_loading", lambda _, layer: processed.append(layer)
    )
    layer = linear(bias)
    found = method(checkpoint, f"model.layers.0.self_attn.{name}")
    with torch.no_grad():
        found.process_weights_after_loading(layer)
    assert processed == [layer]


def test_a_bias_that_nothing_stored_fills_is_refused_once_loaded(checkpoint: Path) -> None:
    found = method(checkpoint, "model.layers.1.self_attn.o_proj")
    with pytest.raises(ServingError, match=r"a bias for model\.layers\.1\.self_attn\.o_proj, and"):
        found.process_weights_after_loading(linear(bias=True))
