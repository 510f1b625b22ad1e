import pytest
import torch

from bench.quality.removal import random_scores, removed, weight_norms
from camera_serve.models import describe
from tests import tiny_models

FAMILIES = ("qwen2_moe", "mixtral", "deepseek")


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_norm_is_the_product_of_the_three_vectors_norms(family: str) -> None:
    model = tiny_models.build(family)
    structure = describe(model.config)
    experts = model.model.layers[structure.moe_layers[0]].mlp.experts
    gate, up = experts.gate_up_proj[3, 5], experts.gate_up_proj[3, structure.d_ff + 5]
    down = experts.down_proj[3, :, 5]
    score = weight_norms(model, structure)[0][3 * structure.d_ff + 5]
    torch.testing.assert_close(score, (gate.norm() * up.norm() * down.norm()).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_zeroes_exactly_the_lowest_scored_and_restores(family: str) -> None:
    model = tiny_models.build(family)
    structure = describe(model.config)
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        scores = random_scores(structure, seed=1)
        with removed(model, structure, scores, [40] * len(structure.moe_layers)):
            norms = weight_norms(model, structure)
            during = model(tokens).logits
        after = model(tokens).logits
    for norm, score in zip(norms, scores, strict=True):
        assert torch.equal(norm == 0, score <= score.sort().values[39])
    assert not torch.equal(before, during)
    assert torch.equal(before, after)


def test_removing_everything_leaves_the_experts_silent() -> None:
    model = tiny_models.build("qwen2_moe")
    structure = describe(model.config)
    everything = [structure.micro_experts_per_layer] * len(structure.moe_layers)
    moe = model.model.layers[structure.moe_layers[0]].mlp
    with torch.inference_mode(), removed(model, structure, random_scores(structure, 0), everything):
        assert not moe(torch.randn(1, 5, structure.d_model)).any()


def test_random_scores_follow_the_seed() -> None:
    structure = describe(tiny_models.build("qwen2_moe").config)
    first, again, other = (random_scores(structure, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
