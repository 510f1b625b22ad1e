"""The linear layers of a packed shared expert, without a server."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config

from camera_serve.checkpoint.format import PARTS, Tiers
from camera_serve.errors import CheckpointError
from camera_serve.vllm_plugin import packed_linear
from camera_serve.vllm_plugin.packed_linear import PackedLinearMethod
from tests.vllm_plugin.experts import Experts, random_experts

D_MODEL = 64
TIERS = Tiers((16, 3, 1), 32)
SHARD_IDS = {"w1": 0, "w3": 1, "w2": None}


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def loaded(
    experts: Experts, linear: str, tp: tuple[int, int] = (1, 0), without: str = ""
) -> tuple[PackedLinearMethod, Any]:
    """One linear layer on one rank, loaded as vLLM loads it and ready to serve."""
    layer: Any = nn.Module()
    layer.tp_size, layer.tp_rank = tp
    method = PackedLinearMethod(experts.counts, TIERS, "mlp.shared_expert", linear)
    width = experts.num_rows
    sizes = (width, [D_MODEL]) if linear == "down_proj" else (D_MODEL, [width, width])
    method.create_weights(layer, *sizes, sizes[0], sum(sizes[1]), torch.float32)
    for (_, shard, part), tensor in experts.tensors.items():
        if (shard == "w2") == (linear == "down_proj") and part != without:
            param = getattr(layer, part)
            param.weight_loader(param, tensor, SHARD_IDS[shard])
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.mark.parametrize("counts", [(5, 40, 3), (0, 2, 0), (1, 0, 0)])
@pytest.mark.parametrize("at_once", [7, 1024])
def test_together_they_are_the_shared_expert(
    counts: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "ROWS_AT_ONCE", at_once)
    experts = random_experts((counts,), TIERS, D_MODEL)
    x = torch.randn(4, D_MODEL)
    wanted = torch.zeros(4, D_MODEL, dtype=torch.float64)
    for rank in (0, 1):
        (first, gate_up), (second, down) = (
            loaded(experts, linear, (2, rank)) for linear in ("gate_up_proj", "down_proj")
        )
        gate, up = first.apply(gate_up, x).chunk(2, dim=-1)
        wanted += second.apply(down, functional.silu(gate) * up)
    rows = [experts.rows[0, shard] for shard in ("w1", "w3", "w2")]
    exact = functional.silu(x.double() @ rows[0].T) * (x.double() @ rows[1].T) @ rows[2]
    # Float32 sums of 64 products of order 1.
    torch.testing.assert_close(wanted, exact, rtol=1e-5, atol=1e-5)


def test_packed_rows_are_given_up_for_dense_ones() -> None:
    experts = random_experts(((5, 40, 3),), TIERS, D_MODEL)
    _, layer = loaded(experts, "gate_up_proj")
    assert layer.dense_weight.shape == (2 * 48, D_MODEL)
    assert all(getattr(layer, part).numel() == 0 for part in PARTS)


def test_rows_that_never_arrived_are_refused() -> None:
    experts = random_experts(((5, 40, 3),), TIERS, D_MODEL)
    with pytest.raises(CheckpointError, match=r"mlp\.shared_expert\.down_proj\.scales was not"):
        loaded(experts, "down_proj", without="scales")
