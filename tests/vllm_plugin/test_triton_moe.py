"""Routed experts by the Triton kernels inside the plugin, as on a GPU.

Without one they run in Triton's interpreter. It must be chosen before Triton is imported, so one
test runs this file again in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from camera_serve.checkpoint.format import Tiers
from camera_serve.vllm_plugin import choice
from tests.vllm_plugin.experts import (
    Experts,
    loaded_layer,
    make_layer,
    moe_config,
    random_experts,
    routed,
)
from tests.vllm_plugin.reloading import addresses, reload, running
from tests.vllm_plugin.shared_mlp import Mlp, exact

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MIXED = Tiers((16, 3, 2), 32)
COUNTS = ((0, 0, 0), (1, 3, 0), (5, 0, 7), (8, 20, 33))
D_MODEL = 64
ALL = range(len(COUNTS))


def here(test: Callable[..., None]) -> Callable[..., None]:
    """Runs in the interpreter only: this build of vLLM has no GPU."""
    return pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")(test)


class NvidiaGpu:
    """The platform that chooses the Triton kernels."""

    def is_cpu(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return True

    def is_cuda(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    monkeypatch.setattr(choice, "current_platform", NvidiaGpu())
    config = VllmConfig()
    config.scheduler_config.max_num_batched_tokens = 1
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def experts() -> Experts:
    return random_experts(COUNTS, MIXED, D_MODEL)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_everything_holds_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 18, done.stdout[-2000:]


# Dot products of at most 64 terms of order 1, then sums of them: a few roundings.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4 * torch.finfo(torch.float16).eps}


def check(out: torch.Tensor, experts: Experts, given: Any, held: range = ALL) -> None:
    wanted = experts.output(*given, held)
    assert out.dtype == given[0].dtype and out.shape == given[0].shape
    assert (out.double() - wanted).norm() / wanted.norm() < TOLERANCE[out.dtype]


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_layer_output_is_that_of_its_experts(num_tokens: int, dtype: torch.dtype) -> None:
    experts = random_experts(COUNTS, MIXED, D_MODEL, dtype)
    method, layer = loaded_layer(experts, dtype=dtype)
    given = routed(num_tokens, experts, 3, dtype)
    check(method.apply(layer, *given, None, None), experts, given)


@here
@pytest.mark.parametrize("tiers", [Tiers((16,)), Tiers((2,), 32)], ids=["16 bits", "2 bits"])
def test_a_single_tier_of_either_kind(tiers: Tiers) -> None:
    experts = random_experts(((4,), (0,), (33,)), tiers, D_MODEL)
    method, layer = loaded_layer(experts)
    given = routed(7, experts, 2, torch.float32)
    check(method.apply(layer, *given, None, None), experts, given, range(3))


@here
@pytest.mark.parametrize("tp_size", [2, 3])
def test_tensor_parallel_ranks_add_up(tp_size: int, experts: Experts) -> None:
    given = routed(9, experts, 2, torch.float32)
    total = torch.zeros_like(given[0])
    for rank in range(tp_size):
        method, layer = loaded_layer(experts, moe_config(tp_size, rank))
        total += method.apply(layer, *given, None, None)
    check(total, experts, given)


@here
@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("counts", [(5, 40, 3), (0, 1, 0)])
def test_packed_shared_experts_run_on_the_same_kernels(counts: tuple[int, ...], first: str) -> None:
    experts = random_experts((counts,), MIXED, D_MODEL)
    x = torch.randn(7, D_MODEL)
    # With a single row, one of the two ranks has none.
    total = torch.zeros_like(x)
    for rank in range(2):
        total += Mlp(experts, tp=(2, rank), first=first)(x)
    wanted = exact(experts, x)
    assert (total.double() - wanted).norm() / wanted.norm() < TOLERANCE[torch.float32]


@here
@pytest.mark.parametrize("held", [range(3), range(3, 4)])
def test_expert_parallel_rank_computes_its_own_experts_from_global_ids(
    held: range, experts: Experts
) -> None:
    method, layer = loaded_layer(experts, held=held)
    given = routed(9, experts, 3, torch.float32)
    check(method.apply(layer, *given, None, None), experts, given, held)


@here
@pytest.mark.parametrize("num_tokens", [1, 3, 12])
def test_padded_rows_change_nothing_and_stay_inside(num_tokens: int, experts: Experts) -> None:
    """vLLM gives them -1, num_experts or whatever their stale activations route to."""
    method, layer = loaded_layer(experts)
    x, weights, ids = routed(num_tokens, experts, 2, torch.float32)
    alone = method.apply(layer, x, weights, ids, None, None)
    check(alone, experts, (x, weights, ids))
    stale = torch.full((6, D_MODEL), torch.nan)
    far = torch.iinfo(torch.int32)
    padding = torch.tensor([[-1, -1], [4, 4], [far.max, far.min], [0, 0], [3, 3], [2, 3]]).int()
    padded = [torch.cat(pair) for pair in ((x, stale), (weights, stale[:, :2]), (ids, padding))]
    out = method.apply(layer, *padded, None, None)
    torch.testing.assert_close(out[:num_tokens], alone, rtol=1e-5, atol=1e-6)
    # Rows of no expert, and of one without micro-experts.
    assert torch.equal(out[num_tokens : num_tokens + 4], torch.zeros(4, D_MODEL))


@here
def test_weights_are_packed_where_they_were_loaded(experts: Experts) -> None:
    method, layer = make_layer(experts)
    experts.load(layer)
    before = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    method.process_weights_after_loading(layer)
    held = dict(layer.named_parameters())
    weights = [t for name, t in held.items() if "grid" not in name and t.numel()]
    assert {weight.untyped_storage().data_ptr() for weight in weights} <= before
    # Of the dtype, float32 here; in packed tiers scale and zero are 32 bits for 32 weights.
    stored = {16: 32, 3: 3 + 1, 2: 2 + 1}
    rows = zip(MIXED.bits, (sum(tier) for tier in zip(*COUNTS, strict=True)), strict=True)
    wanted = sum(3 * D_MODEL * count * stored[bits] for bits, count in rows)
    assert sum(parameter.nbytes for parameter in held.values()) * 8 == wanted


@here
def test_reloaded_weights_lie_where_captured_graphs_read_them(experts: Experts) -> None:
    method, layer, model = running(experts)
    before = addresses(model)
    others = random_experts(COUNTS, MIXED, D_MODEL)
    reload(others, layer, model)
    given = routed(7, others, 2, torch.float32)
    check(method.apply(layer, *given, None, None), others, given)
    assert addresses(model) == before


@here
def test_kernels_are_compiled_before_requests_come(
    experts: Experts, on_a_gpu: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camera_serve.vllm_plugin import triton_moe

    called = []
    run = triton_moe.ragged_moe

    def counted(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: Any) -> Any:
        called.append((tuple(x.shape), tuple(ids.shape), ids.dtype, weights.dtype))
        return run(x, weights, ids, layer)

    monkeypatch.setattr(triton_moe, "ragged_moe", counted)
    on_a_gpu.scheduler_config.max_num_batched_tokens = 5
    loaded_layer(experts)
    # Up to the engine's 5 tokens, with ids and weights as vLLM gives them.
    kinds = (torch.int32, torch.float32)
    assert called == [((n, D_MODEL), (n, 2), *kinds) for n in (1, 2, 4, 5)]


@here
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_torch_compile_sees_one_opaque_call(num_tokens: int, experts: Experts) -> None:
    method, layer = loaded_layer(experts)
    x, top_k_weights, ids = routed(num_tokens, experts, 2, torch.float32)

    def step(x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, top_k_weights, ids, None, None) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))


@here
def test_the_shape_is_known_without_weights_for_any_number_of_tokens(experts: Experts) -> None:
    method, layer = loaded_layer(experts)

    def step(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, weights, ids, None, None).relu()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (5, 8):
        given = routed(num_tokens, experts, 2, torch.float32)
        assert torch.equal(compiled(*given), step(*given))
