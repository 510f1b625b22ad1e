"""Weights that vLLM loads into a running engine, and saves from one, by its own functions."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from camera_serve.checkpoint.format import DENSE_TIERS, Tiers
from camera_serve.errors import CheckpointError, ServingError
from camera_serve.vllm_plugin.linear import SharedDownMethod, SharedGateUpMethod
from tests.vllm_plugin.experts import make_layer, random_experts, routed
from tests.vllm_plugin.reloading import addresses, reload, running
from tests.vllm_plugin.shared_mlp import Mlp, exact

COUNTS = ((0, 0, 0), (1, 3, 0), (5, 0, 7), (8, 2, 33))
MIXED = Tiers((16, 3, 2), 32)
D_MODEL = 64


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiers", [DENSE_TIERS, MIXED], ids=["16 bits", "three tiers"])
def test_reloaded_weights_are_served_from_where_the_old_ones_lay(
    tiers: Tiers, dtype: torch.dtype
) -> None:
    counts = [c[-len(tiers.bits) :] for c in COUNTS]
    first, second, third = (random_experts(counts, tiers, D_MODEL, dtype) for _ in range(3))
    method, layer, model = running(first, dtype)
    before = addresses(model)
    given = routed(7, second, 2, dtype)
    for experts in (second, third):
        reload(experts, layer, model)
        out = method.apply(layer, *given, None, None)
        wanted = experts.output(*given, range(4))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
        assert addresses(model) == before


@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("again", ["gate_up_proj", "down_proj"])
def test_packed_shared_experts_are_reloaded_in_any_order(first: str, again: str) -> None:
    experts, others = (random_experts(((5, 40, 3),), MIXED, D_MODEL) for _ in range(2))
    model = nn.Module()
    mlp = Mlp(experts, first=first, model=model)
    before = addresses(model)
    initialize_layerwise_reload(model)
    for linear in sorted(mlp.layers, reverse=again == "gate_up_proj"):
        mlp.load(others, linear)
    finalize_layerwise_reload(model, None)
    x = torch.randn(7, D_MODEL)
    torch.testing.assert_close(mlp(x).double(), exact(others, x), rtol=1e-5, atol=1e-5)
    assert addresses(model) == before


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    """What vLLM's own parameters ask for."""
    init_distributed_environment(1, 0, f"file://{tmp_path / 'rendezvous'}", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("rank", [0, 1])
def test_padding_of_shared_experts_is_zero_in_fresh_memory(rank: int) -> None:
    """37 micro-experts on two ranks: one has 18, and vLLM reloads into memory of any content."""
    method = SharedGateUpMethod(((37,),), "mlp.shared_expert", ("gate", "up"))
    layer = fresh_shared_layer(method, D_MODEL, 74, rank)
    whole = torch.randn(2, 37, D_MODEL)
    for index, tensor in enumerate(whole):
        layer.weight.weight_loader(layer.weight, tensor, index)
    start, end = 37 * rank // 2, 37 * (rank + 1) // 2
    wanted = torch.zeros(2, 19, D_MODEL)
    wanted[:, : end - start] = whole[:, start:end]
    assert layer.weight.unflatten(0, (2, 19)).equal(wanted)

    method = SharedGateUpMethod(((37,),), "mlp.shared_expert", ("up",))
    layer = fresh_shared_layer(method, D_MODEL, 37, rank)
    layer.weight.weight_loader(layer.weight, whole[1])
    assert layer.weight.equal(wanted[1])

    method = SharedDownMethod(((37,),), "mlp.shared_expert", ("down",))
    layer = fresh_shared_layer(method, 37, D_MODEL, rank)
    layer.weight.weight_loader(layer.weight, whole[0].t())
    assert layer.weight.equal(wanted[0].t())


def fresh_shared_layer(method: Any, inputs: int, outputs: int, rank: int) -> Any:
    layer: Any = nn.Module()
    layer.tp_size, layer.tp_rank = 2, rank
    method.create_weights(layer, inputs, [outputs], inputs, outputs, torch.float32)
    layer.weight.data.fill_(torch.nan)
    return layer


def test_a_tensor_missing_from_a_reload_is_named() -> None:
    experts, others = (random_experts(COUNTS, MIXED, D_MODEL) for _ in range(2))
    _, layer, model = running(experts)
    del others.tensors[2, "w2", "qweight"]
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.qweight was not loaded"):
        reload(others, layer, model)


def test_a_reload_of_another_layout_is_refused() -> None:
    experts = random_experts(COUNTS, MIXED, D_MODEL)
    others = random_experts((*COUNTS[:3], (9, 2, 32)), MIXED, D_MODEL)
    _, layer, model = running(experts)
    with pytest.raises(CheckpointError, match=r"experts\.3\..* has shape .* implies"):
        reload(others, layer, model)


def test_a_layer_is_freed_with_its_engine() -> None:
    method, layer, model = running(random_experts(COUNTS, MIXED, D_MODEL))
    gone = [weakref.ref(layer), weakref.ref(method)]
    del method, layer, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_saving_from_a_running_engine_is_refused_by_name() -> None:
    _, _, model = running(random_experts(COUNTS, MIXED, D_MODEL))
    with pytest.raises(ServingError, match=r"^experts: .* \(save_sharded_state\).*Copy the check"):
        model.state_dict()


def test_loading_may_ask_for_the_parameters_by_name() -> None:
    _, layer = make_layer(random_experts(COUNTS, MIXED, D_MODEL))
    assert {"w13_weight", "w2_qweight"} <= layer.state_dict().keys()
