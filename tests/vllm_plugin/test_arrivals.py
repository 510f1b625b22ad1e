"""A weight of vLLM's model that no tensor fills stops the server: it would hold anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from camera_serve.errors import ServingError
from tests import pruning, tiny_models
from tests.vllm_plugin.test_config import open_as_vllm_does
from tests.vllm_plugin.test_refusals import layer_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("arrivals") / "dense")
    pruning.prune(dense, dense.with_name("pruned"))
    return dense.with_name("pruned")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def method(checkpoint: Path, kind: type[nn.Module], prefix: str, speculative: Any = None) -> Any:
    config, engine = open_as_vllm_does(checkpoint), VllmConfig()
    engine.speculative_config = speculative
    with set_current_vllm_config(engine):
        return config.get_quant_method(layer_of(kind), prefix)


def created(method: Any) -> nn.Module:
    """What vLLM allocates for a layer of two weights that are one of its."""
    layer = nn.Module()
    method.create_weights(layer, 8, [4, 4], 8, 8, torch.bfloat16, weight_loader=lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(RowParallelLinear, "model.layers.1.self_attn.o_proj"), (ParallelLMHead, "lm_head")],
)
@pytest.mark.parametrize("filled", [0, 4])
def test_a_weight_that_is_not_filled_whole_is_named(
    checkpoint: Path, kind: type[nn.Module], prefix: str, filled: int
) -> None:
    found = method(checkpoint, kind, prefix)
    layer: Any = created(found)
    layer.weight.data[:filled] = 1.0
    with pytest.raises(ServingError, match=f"{prefix}.weight of vLLM's model is not filled"):
        found.process_weights_after_loading(layer)


@pytest.mark.parametrize("kind", [RowParallelLinear, ParallelLMHead])
def test_a_weight_that_is_filled_is_taken(checkpoint: Path, kind: type[nn.Module]) -> None:
    prefix = "lm_head" if kind is ParallelLMHead else "model.layers.0.self_attn.o_proj"
    found = method(checkpoint, kind, prefix)
    layer: Any = created(found)
    layer.weight.data[:] = 1.0
    found.process_weights_after_loading(layer)


@pytest.mark.parametrize("prefix", ["model.layers.7.eh_proj", "mtp.layers.0.fc", "visual.fc"])
def test_parts_beside_the_model_may_be_filled_later(checkpoint: Path, prefix: str) -> None:
    found = method(checkpoint, RowParallelLinear, prefix)
    assert created(found).get_parameter("weight") is not None
    found.process_weights_after_loading(nn.Linear(2, 2, bias=False))


def test_the_head_of_a_draft_may_be_filled_later(checkpoint: Path) -> None:
    class Speculative:
        draft_model_config = None

    assert method(checkpoint, ParallelLMHead, "lm_head", Speculative()) is None
    assert method(checkpoint, ParallelLMHead, "model.layers.7.shared_head.head") is None
