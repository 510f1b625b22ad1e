import pytest
import torch

from bench.shapes.energy_spread import kept_work
from bench.shapes.published import SHAPES, layer_counts, layer_energies
from camera_serve.recipe import TierPlan


@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_s_shares_hold_over_a_layer_in_multiples_of_32(name: str) -> None:
    shape = SHAPES[name]
    layout = layer_counts(shape, TierPlan.parse("4:0.1,3:0.2,2:0.5,0:0.2"), seed=1)
    counts = torch.tensor([*layout.experts, *layout.shared])
    total = shape.num_experts * shape.d_ff + shape.shared_d_ff
    assert len(layout.experts) == shape.num_experts
    assert len(layout.shared) == (shape.shared_d_ff > 0)
    assert not (counts % 32).any()
    torch.testing.assert_close(
        counts.sum(0) / total, torch.tensor([0.1, 0.2, 0.5]), rtol=0, atol=32 / total
    )
    assert max(layout.expert_d_ff) <= shape.d_ff


def test_layers_differ_and_come_again_by_their_seed() -> None:
    shape, plan = SHAPES["qwen3-30b-a3b"], TierPlan.prune(0.4)
    assert layer_counts(shape, plan, 0) == layer_counts(shape, plan, 0)
    assert layer_counts(shape, plan, 0) != layer_counts(shape, plan, 1)
    widths = torch.tensor(layer_counts(shape, plan, 0).expert_d_ff) / shape.d_ff
    assert widths.min() == 0 and widths.max() == 1 and 0.2 < widths.std() < 0.5


def test_experts_that_keep_more_see_more_tokens() -> None:
    shape = SHAPES["qwen3-30b-a3b"]
    for seed in range(4):
        assert 0.64 < kept_work(layer_energies(shape, seed), 40) < 0.85


def test_without_a_plan_every_expert_is_whole() -> None:
    layout = layer_counts(SHAPES["mixtral-8x7b"], TierPlan.parse("16:1"), seed=0)
    assert layout.experts == ((14336,),) * 8
