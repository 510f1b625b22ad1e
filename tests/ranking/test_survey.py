"""The survey of a model against transformers' own forward, and plans over all its layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from camera_serve import Calibration, Recipe, TierPlan
from camera_serve.calibration.streaming import ModelStream
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.ranking.elimination import eliminate, shrunk
from camera_serve.ranking.selection import ELSEWHERE
from camera_serve.ranking.survey import (
    SURVEYED_SHARE,
    TOKENS_OF_AN_EXPERT,
    LayerSurvey,
    _weight_of,
    survey_layer,
    surveyed_share,
)
from tests import tiny_models

CPU = torch.device("cpu")
LAYER = 1


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory):
    path = tiny_models.save(
        "qwen2_moe", tmp_path_factory.mktemp("models") / "model", dtype=torch.float32
    )
    stream = ModelStream(Checkpoint.open(path), CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (6, 40), generator=generator)
    hidden = stream.embed(tokens)
    for layer in range(LAYER + 1):
        survey = survey_layer(stream, layer, stream.load(layer), hidden)
    return path, tokens, survey, hidden


@torch.no_grad()
def _dense(path: Path, tokens: torch.Tensor):
    """What enters and leaves the layer's MoE, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen = {}
    layer = model.model.layers[LAYER]
    layer.mlp.register_forward_hook(lambda module, given, made: seen.update(x=given[0]))
    layer.register_forward_hook(lambda module, given, made: seen.update(out=made))
    model(tokens)
    return layer.mlp, seen["x"].flatten(0, 1), seen["out"]


def test_the_layer_goes_on_as_it_is_and_weighs_by_its_residual_stream(surveyed) -> None:
    path, tokens, survey, hidden = surveyed
    _, _, out = _dense(path, tokens)
    torch.testing.assert_close(hidden, out)
    sizes = out.flatten(0, 1).norm(dim=1).double()
    assert survey.weight == pytest.approx(float(sizes.log().mean().exp()) ** -2, rel=1e-5)


@pytest.mark.parametrize("expert", [0, 5])
def test_experts_are_taken_apart_by_what_they_made_of_their_tokens(surveyed, expert: int) -> None:
    path, tokens, survey, _ = surveyed
    moe, x, _ = _dense(path, tokens)
    _, weights, ids = moe.gate(x)
    rows, slots = (ids == expert).nonzero(as_tuple=True)
    gate, up = moe.experts.gate_up_proj[expert].detach().chunk(2)
    hidden = functional.silu(x[rows] @ gate.T) * (x[rows] @ up.T)
    phi = (hidden * weights[rows, slots][:, None]).double().detach()
    down = moe.experts.down_proj[expert].detach().T
    torch.testing.assert_close(
        survey.energies.experts[expert],
        phi.square().sum(0) * down.double().square().sum(1),
        rtol=1e-4,
        atol=0,
    )
    (_,), (costs,) = eliminate(shrunk(phi.T @ phi, len(phi))[None], down[None])
    torch.testing.assert_close(survey.costs[expert], costs, rtol=1e-2, atol=0)


def test_the_shared_expert_counts_by_its_gate(surveyed) -> None:
    path, tokens, survey, _ = surveyed
    moe, x, _ = _dense(path, tokens)
    with torch.no_grad():
        shared = moe.shared_expert
        hidden = functional.silu(shared.gate_proj(x)) * shared.up_proj(x)
        phi = (hidden * torch.sigmoid(moe.shared_expert_gate(x))).double()
        down = shared.down_proj.weight.T
        (_,), (costs,) = eliminate(shrunk(phi.T @ phi, len(phi))[None], down[None])
    torch.testing.assert_close(survey.costs[-1], costs, rtol=1e-2, atol=0)


def test_a_survey_comes_back_from_its_tensors(surveyed) -> None:
    _, _, survey, _ = surveyed
    survey = replace(survey, losses={3: 0.5, 1: 0.25})
    again = LayerSurvey.of(survey.tensors())
    assert again.losses == survey.losses
    assert again.weight == survey.weight
    assert again.energies.experts.equal(survey.energies.experts)
    assert again.apart.equal(survey.apart)
    for part in ("order", "costs", "norms"):
        for one, other in zip(getattr(again, part), getattr(survey, part), strict=True):
            assert one.equal(other)


@pytest.mark.parametrize(
    ("plan", "refit", "tokens_per_expert", "share"),
    [
        ("16:0.6,0:0.4", True, 1e6, 1 / SURVEYED_SHARE),
        ("16:0.6,0:0.4", True, 2 * TOKENS_OF_AN_EXPERT, 1 / 2),
        ("16:0.6,0:0.4", True, 1, 1),
        ("16:0.6,0:0.4", False, 1e6, 1),
        ("16:0.6,0:0.4", {"elimination": False}, 1e6, 1),
        ("3:0.2,2:0.6,1:0.2", False, 1e6, 1 / SURVEYED_SHARE),
    ],
)
def test_a_part_is_surveyed_where_all_tokens_choose_anew(
    surveyed, plan: str, refit: bool | dict[str, bool], tokens_per_expert: float, share: float
) -> None:
    structure = Checkpoint.open(surveyed[0]).structure
    tokens = int(tokens_per_expert * structure.num_experts / structure.top_k)
    calibration = Calibration(source="text", samples=tokens // 2, seq_len=2)
    how = refit if isinstance(refit, dict) else {"refit": refit}
    asked = Recipe(plan=TierPlan.parse(plan), calibration=calibration, **how)
    assert surveyed_share(structure, asked) == pytest.approx(share, rel=1e-2)


def test_where_nothing_is_removed_experts_are_taken_apart_by_energy(surveyed) -> None:
    path, tokens, removing, _ = surveyed
    stream = ModelStream(Checkpoint.open(path), CPU, torch.float32)
    hidden = stream.embed(tokens)
    for layer in range(LAYER + 1):
        survey = survey_layer(stream, layer, stream.load(layer), hidden, 0)
    assert survey.weight == removing.weight
    for expert, energies in enumerate(removing.energies.per_expert):
        assert survey.energies.per_expert[expert].equal(energies)
        assert survey.order[expert].equal(energies.argsort(stable=True))
        assert survey.costs[expert].equal(energies.sort().values)


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_no_single_token_decides_what_a_layer_is_worth(size: float) -> None:
    """A massive token as in large models, or one that is next to nothing, in one layer of two."""
    hidden = torch.randn(4, 200, 16, generator=torch.Generator().manual_seed(0))
    weight = _weight_of(hidden)
    hidden[2, 17] *= size
    assert _weight_of(hidden) == pytest.approx(weight, rel=0.05)
    assert _weight_of(2 * hidden) == pytest.approx(_weight_of(hidden) / 4)
    assert 0 < _weight_of(torch.zeros(1, 2, 16)) < torch.inf


def test_what_a_text_never_used_is_worth_a_little_by_the_size_of_its_weights(surveyed) -> None:
    path, _, survey, _ = surveyed
    for energies, worth, norms in zip(
        survey.energies.per_expert, survey.worth, survey.norms, strict=True
    ):
        assert (worth > energies).all()
        extra = (worth - energies) / norms
        torch.testing.assert_close(extra, extra[:1].expand_as(extra))
    moe = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers[LAYER].mlp
    down = moe.experts.down_proj[3].detach().double()
    torch.testing.assert_close(survey.norms[3], down.square().sum(0))
    squares = survey.energies.experts / torch.stack(survey.norms[:-1])
    wanted = survey.energies.experts[3] + ELSEWHERE * squares.mean() * survey.norms[3]
    torch.testing.assert_close(survey.worth[3], wanted)


def test_by_energy_nothing_makes_up_for_anything(surveyed) -> None:
    _, _, survey, _ = surveyed
    plain = survey.by_energy()
    for own, worth in zip(plain.energies.per_expert, plain.removal_scores, strict=True):
        assert worth.equal(own)
    assert all((costs.diff() >= 0).all() for costs in plain.costs)
    scores = zip(plain.removal_scores, survey.removal_scores, strict=True)
    assert not any(one.equal(other) for one, other in scores)
