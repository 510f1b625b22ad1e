"""Routed experts without a server: allocation, vLLM's loading calls, the kernel, refusals."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from camera_serve.checkpoint.format import Tiers
from camera_serve.errors import CheckpointError, ServingError
from camera_serve.vllm_plugin import compat
from camera_serve.vllm_plugin.moe import CameraMoEMethod
from tests.vllm_plugin.experts import (
    Experts,
    camera_config,
    loaded_layer,
    make_layer,
    moe_config,
    name,
    random_experts,
    routed,
)

COUNTS = ((0,), (1,), (5,), (8,))
D_MODEL = 16
NUM_ROWS = 14


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def experts() -> Experts:
    return random_experts(COUNTS, d_model=D_MODEL)


def tokens(experts: Experts, dtype: torch.dtype = torch.float32) -> Any:
    return routed(5, experts, 2, dtype)


def check(out: torch.Tensor, experts: Experts, given: Any, held: range = range(4)) -> None:
    wanted = experts.output(*given, held)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_exactly_the_kept_rows_are_allocated(experts: Experts) -> None:
    _, layer = make_layer(experts)
    floats = sum(parameter.numel() for parameter in layer.parameters())
    assert floats == 3 * NUM_ROWS * D_MODEL


def test_layer_output_is_that_of_its_experts(experts: Experts) -> None:
    method, layer = loaded_layer(experts)
    given = tokens(experts)
    before = given[0].clone()
    check(method.apply(layer, *given, None, None), experts, given)
    assert torch.equal(given[0], before)


def test_tiers_of_several_widths_add_up() -> None:
    counts, tiers = ((0, 0, 0), (1, 3, 0), (5, 0, 7), (8, 2, 33)), Tiers((16, 3, 2), 32)
    experts = random_experts(counts, tiers, d_model=64)
    method, layer = loaded_layer(experts)
    given = tokens(experts)
    check(method.apply(layer, *given, None, None), experts, given)


def test_one_copy_of_the_rows_stays(experts: Experts) -> None:
    method, layer = make_layer(experts)
    experts.load(layer)
    before = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    method.process_weights_after_loading(layer)
    assert layer.w13_weight.numel() == layer.w2_weight.numel() == 0
    rows = [parameter for parameter in layer.parameters() if parameter.numel()]
    assert sum(parameter.numel() for parameter in rows) == 3 * NUM_ROWS * D_MODEL
    assert {parameter.untyped_storage().data_ptr() for parameter in rows} <= before


@pytest.mark.parametrize("tp_size", [2, 3])
def test_tensor_parallel_ranks_add_up(tp_size: int, experts: Experts) -> None:
    given, rows = tokens(experts), 0
    total = torch.zeros_like(given[0])
    for rank in range(tp_size):
        method, layer = loaded_layer(experts, moe_config(tp_size, rank))
        total += method.apply(layer, *given, None, None)
        rows += sum(parameter.numel() for parameter in layer.parameters()) // (3 * D_MODEL)
    check(total, experts, given)
    assert rows == NUM_ROWS


@pytest.mark.parametrize("held", [range(2), range(2, 4)])
def test_expert_parallel_rank_computes_its_own_experts_from_global_ids(
    held: range, experts: Experts
) -> None:
    method, layer = loaded_layer(experts, held=held)
    given = tokens(experts)
    check(method.apply(layer, *given, None, None), experts, given, held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_sees_one_opaque_call(dtype: torch.dtype) -> None:
    experts = random_experts(COUNTS, d_model=32, dtype=dtype)
    method, layer = loaded_layer(experts, dtype=dtype)
    x, top_k_weights, ids = tokens(experts, dtype)

    def step(x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, top_k_weights, ids, None, None) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))


def test_a_tensor_that_never_came_stops_the_server(experts: Experts) -> None:
    method, layer = make_layer(experts)
    del experts.tensors[2, "w2", "weight"]
    experts.load(layer)
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.weight was not loaded"):
        method.process_weights_after_loading(layer)


def test_dummy_weights_need_no_tensor(vllm_config: VllmConfig, experts: Experts) -> None:
    vllm_config.load_config.load_format = "dummy"
    method, layer = make_layer(experts)
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": MoEActivation.GELU}, "layers.0.mlp: activation .* is not silu"),
        ({"apply_router_weight_on_input": True}, "layers.0.mlp: router weights on the experts"),
        ({"global_num_experts": 5}, "vLLM wants 5 experts, the checkpoint has 4"),
        ({"swiglu_limit": 7.0}, "layers.0.mlp: swiglu_limit 7.0 is not known"),
        ({"moe_config": moe_config(has_bias=True)}, "layers.0.mlp: experts with a bias"),
    ],
)
def test_layers_the_kernel_does_not_reproduce_are_refused(
    settings: dict[str, Any], message: str, experts: Experts
) -> None:
    with pytest.raises(ServingError, match=message):
        make_layer(experts, **settings)


def build_vllm_s_own(monkeypatch: pytest.MonkeyPatch, experts: Experts, **settings: Any) -> Any:
    """The whole layer, as vLLM's models build it with these settings."""
    quantization = camera_config()

    def method(layer: Any, prefix: str) -> CameraMoEMethod:
        return CameraMoEMethod(
            layer.moe_config, experts.counts, experts.tiers, "layers.0.mlp", name
        )

    monkeypatch.setattr(quantization, "get_quant_method", method)
    return FusedMoEFactory(
        num_experts=len(experts.counts),
        top_k=2,
        hidden_size=D_MODEL,
        intermediate_size=8,
        tp_size=1,
        dp_size=1,
        pcp_size=1,
        params_dtype=torch.float32,
        quant_config=quantization,
        prefix="layers.0.mlp.experts",
        **settings,
    )


def test_vllm_s_own_layer_of_plain_swiglu_is_taken(
    monkeypatch: pytest.MonkeyPatch, experts: Experts
) -> None:
    layer = build_vllm_s_own(monkeypatch, experts, scoring_func="sigmoid")
    assert isinstance(layer.routed_experts.quant_method, CameraMoEMethod)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swiglu_limit": 7.0}, "swiglu_limit 7.0 is not known"),
        ({"swiglu_alpha": 1.702}, "swiglu_alpha 1.702 is not known"),
        ({"swiglu_beta": 1.0}, "swiglu_beta 1.0 is not known"),
        ({"has_bias": True}, "experts with a bias are not known"),
        ({"apply_router_weight_on_input": True}, "router weights on the experts' input"),
        *(
            ({"activation": activation.value}, f"activation {activation} is not silu")
            for activation in MoEActivation
            if activation.is_gated and activation != MoEActivation.SILU
        ),
    ],
)
def test_vllm_s_own_layer_with_more_than_swiglu_is_refused_by_name(
    settings: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    experts: Experts,
) -> None:
    with pytest.raises(ServingError, match=re.escape(f"layers.0.mlp: {message}")):
        build_vllm_s_own(monkeypatch, experts, **settings)


ROUTING_SETTINGS = (
    "use_grouped_topk",
    "top_k",
    "renormalize",
    "topk_group",
    "num_expert_group",
    "custom_routing_function",
    "scoring_func",
    "routed_scaling_factor",
    "e_score_correction_bias",
)


def test_vllm_without_a_cpu_router_routes_with_its_own_function(
    monkeypatch: pytest.MonkeyPatch, experts: Experts
) -> None:
    x, top_k_weights, ids = given = tokens(experts)
    asked = {}

    def select_experts(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.update(arguments)
        return top_k_weights.double(), ids.long()

    monkeypatch.setattr(compat, "_routes_itself", lambda: True)
    monkeypatch.setattr(compat, "_cpu_routing", lambda: select_experts)
    settings = {key: f"the layer's {key}" for key in ROUTING_SETTINGS}
    method, layer = loaded_layer(experts, **settings)

    logits = torch.randn(5, 4)
    out = method.apply_monolithic(layer, x, logits)
    check(out, experts, given)
    assert out.dtype == x.dtype
    assert asked.pop("hidden_states") is x
    assert asked.pop("router_logits") is logits
    assert asked == settings


def test_its_routing_is_part_of_compiled_graphs(
    monkeypatch: pytest.MonkeyPatch, experts: Experts
) -> None:
    x, _, _ = tokens(experts)
    top_k = 2

    def select_experts(router_logits: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router_logits.softmax(-1).topk(top_k)
        return weights, ids

    monkeypatch.setattr(compat, "_routes_itself", lambda: True)
    monkeypatch.setattr(
        compat, "import_module", lambda _: SimpleNamespace(select_experts=select_experts)
    )
    monkeypatch.setattr(compat, "find_spec", lambda _: True)
    method, layer = loaded_layer(experts, **dict.fromkeys(ROUTING_SETTINGS))
    logits = torch.randn(len(x), 4)
    # As vLLM compiles a model: what cannot be traced is an error.
    compiled = torch.compile(method.apply_monolithic, fullgraph=True, backend="eager")
    assert compiled(layer, x, logits).equal(method.apply_monolithic(layer, x, logits))
