"""A packed shared expert, loaded and called as vLLM calls its linear layers."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from camera_serve.checkpoint.format import Tiers
from camera_serve.errors import CheckpointError
from camera_serve.vllm_plugin.packed_shared import PackedSharedExpert
from tests.vllm_plugin.experts import random_experts
from tests.vllm_plugin.shared_mlp import MERGED, SEPARATE, Mlp, exact

D_MODEL = 64
TIERS = Tiers((16, 3, 1), 32)
COUNTS = (5, 40, 3)


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("counts", [COUNTS, (0, 2, 0), (1, 0, 0)])
@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("linears", [MERGED, SEPARATE], ids=["merged", "separate"])
def test_ranks_add_up_to_the_shared_expert(
    counts: tuple[int, ...], first: str, linears: Sequence[str]
) -> None:
    experts = random_experts((counts,), TIERS, D_MODEL)
    x = torch.randn(4, D_MODEL)
    out = sum(Mlp(experts, tp=(2, rank), first=first, linears=linears)(x) for rank in (0, 1))
    # Float32 sums of 64 products of order 1.
    torch.testing.assert_close(out.double(), exact(experts, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_in_bfloat16_the_cpu_kernel_computes_it(num_tokens: int) -> None:
    experts = random_experts((COUNTS,), TIERS, D_MODEL, torch.bfloat16)
    x = torch.randn(num_tokens, D_MODEL).bfloat16()
    out, wanted = Mlp(experts, torch.bfloat16)(x), exact(experts, x)
    assert out.dtype == torch.bfloat16
    # Activations, in packed tiers times their scales, and the output are rounded to bf16. A mistake
    # is far above three times the most that one rounding does.
    assert (out.double() - wanted).norm() / wanted.norm() < 3 * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_output_comes_through_the_activation_unchanged(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = Mlp(random_experts((COUNTS,), TIERS, D_MODEL, dtype), dtype)
    sizes = 2.0 ** torch.arange(-8, 8).repeat(4)
    out = (torch.randn(5, D_MODEL) * sizes).to(dtype)
    monkeypatch.setattr(PackedSharedExpert, "output", lambda self, x: out)
    found = mlp(torch.zeros_like(out))
    if dtype != torch.float16:
        assert torch.equal(found, out)
    # Float16 has steps of 2^-24 below 2^-14, here 32 times as wide: nothing against outputs.
    torch.testing.assert_close(found, out, rtol=0, atol=2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_stay_packed_in_memory(dtype: torch.dtype) -> None:
    experts = random_experts(((0, 64, 32),), TIERS, D_MODEL, dtype)
    packed = 3 * D_MODEL * (64 * 3 + 32 * 1) // 8 + 3 * 96 * (D_MODEL // 32) * 4
    mlp = Mlp(experts, dtype)
    # The offsets of three tiers.
    assert packed <= mlp.num_bytes <= packed + 3 * 2 * 8


def test_torch_compile_sees_one_opaque_call() -> None:
    mlp = Mlp(random_experts((COUNTS,), TIERS, D_MODEL, torch.bfloat16), torch.bfloat16)
    x = torch.randn(5, D_MODEL).bfloat16()

    def step(x: torch.Tensor) -> torch.Tensor:
        return mlp.methods["gate_up_proj"].apply(mlp.layers["gate_up_proj"], x) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), step(x))


def test_rows_that_never_arrived_are_refused() -> None:
    experts = random_experts((COUNTS,), TIERS, D_MODEL)
    with pytest.raises(CheckpointError, match=r"mlp\.shared_expert\.gate_proj\.scales was not"):
        Mlp(experts, without="scales")
