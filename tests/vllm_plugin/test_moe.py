"""Routed experts without a server: allocation, vLLM's loading calls, the kernel, refusals."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from camera_serve.checkpoint.format import DENSE_TIERS
from camera_serve.errors import CheckpointError, ServingError
from camera_serve.vllm_plugin import compat, moe
from camera_serve.vllm_plugin.moe import CameraMoEMethod

COUNTS = ((0,), (1,), (5,), (8,))
D_MODEL = 16
NUM_ROWS = 14


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def moe_config(tp_size: int = 1, tp_rank: int = 0, *, eplb: bool = False) -> Any:
    parallel = SimpleNamespace(enable_eplb=eplb)
    return SimpleNamespace(tp_size=tp_size, tp_rank=tp_rank, moe_parallel_config=parallel)


def make_layer(config: Any = None, held: range = range(4), **settings: Any) -> tuple[Any, Any]:
    """A CameraMoEMethod and the layer it created weights for; `held`: the experts of this rank."""
    method = CameraMoEMethod(config or moe_config(), COUNTS, DENSE_TIERS, "layers.0.mlp", name)
    layer = nn.Module()
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.global_num_experts = 4
    layer._map_global_expert_id_to_local_expert_id = lambda expert: (
        expert - held.start if expert in held else -1
    )
    for key, value in settings.items():
        setattr(layer, key, value)
    method.create_weights(
        layer,
        num_experts=len(held),
        hidden_size=D_MODEL,
        intermediate_size_per_partition=8,
        params_dtype=torch.float32,
        weight_loader=None,
        global_num_experts=4,
    )
    return method, layer


def name(expert: int, projection: str) -> str:
    return f"layers.0.mlp.experts.{expert}.{projection}_proj"


def expert_weights() -> dict[tuple[int, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for expert, (width,) in enumerate(COUNTS):
        for shard in ("w1", "w3", "w2"):
            shape = (D_MODEL, width) if shard == "w2" else (width, D_MODEL)
            weights[expert, shard] = torch.randn(shape, generator=generator)
    return weights


def load(layer: Any, weights: dict[tuple[int, str], torch.Tensor]) -> None:
    """Call the loaders as vLLM's two families of models do."""
    for (expert, shard), tensor in weights.items():
        if not tensor.numel():
            continue
        attribute = "w2_weight" if shard == "w2" else "w13_weight"
        param = getattr(layer, attribute)
        full_name = f"layers.0.mlp.experts.{attribute}"
        rest = {"shard_id": shard, "expert_id": expert, "return_success": True}
        if expert % 2:
            param.weight_loader(param, tensor, full_name, **rest)
        else:
            param.weight_loader(param=param, loaded_weight=tensor, weight_name=full_name, **rest)


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, D_MODEL, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)]).int()
    return x, torch.rand(5, 2, generator=generator), ids


def direct(
    x: torch.Tensor, top_k_weights: torch.Tensor, ids: torch.Tensor, held: range = range(4)
) -> torch.Tensor:
    """Every routed (token, expert) pair on its own, in float64, from the checkpoint's tensors."""
    weights = {key: tensor.double() for key, tensor in expert_weights().items()}
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot, expert in enumerate(ids[token].tolist()):
            if expert in held:
                row = x[token].double()
                gate, up = weights[expert, "w1"] @ row, weights[expert, "w3"] @ row
                hidden = functional.silu(gate) * up
                out[token] += top_k_weights[token, slot] * (weights[expert, "w2"] @ hidden)
    return out


def test_exactly_the_kept_rows_are_allocated() -> None:
    _, layer = make_layer()
    floats = sum(parameter.numel() for parameter in layer.parameters())
    assert floats == 3 * NUM_ROWS * D_MODEL


def test_layer_output_is_that_of_its_experts() -> None:
    method, layer = make_layer()
    load(layer, expert_weights())
    method.process_weights_after_loading(layer)
    x, top_k_weights, ids = routed()
    before = x.clone()
    out = method.apply(layer, x, top_k_weights, ids, None, None)
    torch.testing.assert_close(out.double(), direct(x, top_k_weights, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("tp_size", [2, 3])
def test_tensor_parallel_ranks_add_up(tp_size: int) -> None:
    x, top_k_weights, ids = routed()
    total, rows = torch.zeros_like(x), 0
    for rank in range(tp_size):
        method, layer = make_layer(moe_config(tp_size, rank))
        load(layer, expert_weights())
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, top_k_weights, ids, None, None)
        rows += layer.w2_weight.shape[0]
    wanted = direct(x, top_k_weights, ids)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    assert rows == NUM_ROWS


@pytest.mark.parametrize("held", [range(2), range(2, 4)])
def test_expert_parallel_rank_computes_its_own_experts_from_global_ids(held: range) -> None:
    method, layer = make_layer(held=held)
    load(layer, expert_weights())
    method.process_weights_after_loading(layer)
    x, top_k_weights, ids = routed()
    out = method.apply(layer, x, top_k_weights, ids, None, None)
    wanted = direct(x, top_k_weights, ids, held)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_torch_compile_sees_one_opaque_call() -> None:
    method, layer = make_layer()
    load(layer, expert_weights())
    x, top_k_weights, ids = routed()

    def step(x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, top_k_weights, ids, None, None) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))


def test_a_tensor_that_never_came_stops_the_server() -> None:
    method, layer = make_layer()
    weights = expert_weights()
    del weights[2, "w2"]
    load(layer, weights)
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.weight was not loaded"):
        method.process_weights_after_loading(layer)


def test_dummy_weights_need_no_tensor(vllm_config: VllmConfig) -> None:
    vllm_config.load_config.load_format = "dummy"
    method, layer = make_layer()
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": MoEActivation.GELU}, "layers.0.mlp: activation .* is not silu"),
        ({"apply_router_weight_on_input": True}, "layers.0.mlp: router weights on the experts"),
        ({"global_num_experts": 5}, "vLLM wants 5 experts, the checkpoint has 4"),
    ],
)
def test_layers_the_kernel_does_not_reproduce_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        make_layer(**settings)


def test_expert_load_balancing_is_refused_with_the_remedy() -> None:
    with pytest.raises(ServingError, match="start without --enable-eplb"):
        make_layer(moe_config(eplb=True))


def test_lora_is_refused_with_the_remedy(vllm_config: VllmConfig) -> None:
    vllm_config.lora_config = SimpleNamespace()
    with pytest.raises(ServingError, match="without --enable-lora"):
        make_layer()


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_cuda_graphs_are_refused_with_the_remedy(
    mode: CUDAGraphMode, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    vllm_config.compilation_config.cudagraph_mode = mode
    if mode == CUDAGraphMode.NONE:
        make_layer()
        return
    with pytest.raises(ServingError, match="start with --enforce-eager"):
        make_layer()


def test_vllm_without_a_cpu_router_routes_with_its_own_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, top_k_weights, ids = routed()
    asked = {}

    def select_experts(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.update(arguments)
        return top_k_weights.double(), ids.long()

    routing = SimpleNamespace(select_experts=select_experts)
    monkeypatch.setattr(compat, "_cpu_routing", lambda: routing)
    names = (
        "use_grouped_topk top_k renormalize topk_group num_expert_group custom_routing_function "
        "scoring_func routed_scaling_factor e_score_correction_bias"
    )
    settings = {key: f"the layer's {key}" for key in names.split()}
    method, layer = make_layer(**settings)
    load(layer, expert_weights())

    logits = torch.randn(5, 4)
    out = method.apply_monolithic(layer, x, logits)
    wanted = direct(x, top_k_weights, ids)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert out.dtype == x.dtype
    assert asked.pop("hidden_states") is x
    assert asked.pop("router_logits") is logits
    assert asked == settings
