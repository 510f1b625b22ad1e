"""Models and texts that give the default recipe little to go by: it is no worse than the paper."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.checkpoint.report import CompressionReport
from camera_serve.evaluation.perplexity import divergence, load_model
from camera_serve.evaluation.verification import verify
from tests import tiny_models
from tests.editing import Tensors, edit_weights

PLANS = {"prune": TierPlan.prune(0.4), "bits": TierPlan.mixed(2, 0.2)}
MUCH, LITTLE, LEAST = (16, 128), (1, 64), (1, 2)
"""Windows, and tokens in each."""


def save(path: Path, change: Callable[[Tensors], object], **settings: Any) -> Path:
    """A model of one MoE layer, changed."""
    settings = {"dtype": torch.float32, "num_hidden_layers": 1} | settings
    tiny_models.save("qwen2_moe", path, **settings)
    edit_weights(path, change)
    return path


def recipe(text: Path, given: tuple[int, int], *, paper: bool = False, **goal: Any) -> Recipe:
    make = Recipe.paper if paper else Recipe
    calibration = Calibration(source=str(text), samples=given[0], seq_len=given[1])
    return make(calibration=calibration, align=8, group_size=32, **goal)


def losses(
    model: Path, text: Path, folder: Path, plan: TierPlan, given: tuple[int, int]
) -> tuple[float, float]:
    """KL divergence from the original on another part of the text: by default, and the paper's."""
    tokens = tiny_models.tokenizer()(text.read_text())["input_ids"]
    windows = [torch.tensor(tokens[start : start + 256])[None] for start in range(0, 2048, 256)]
    dense, found = load_model(model), []
    for paper in (False, True):
        output = folder / f"{paper}"
        compress(model, output, recipe(text, given, paper=paper, plan=plan))
        found.append(divergence(load_model(output), dense, windows).mean)
    return found[0], found[1]


def experts(tensors: Tensors, projection: str, which: str = "experts.") -> list[torch.Tensor]:
    name = f"{projection}_proj.weight"
    return [tensor for key, tensor in tensors.items() if which in key and key.endswith(name)]


def _down_of_zero(tensors: Tensors) -> None:
    for down in experts(tensors, "down", "experts.1."):
        down.zero_()
    for down in experts(tensors, "down", "experts.2."):
        down[:, ::2] = 0


def _all_alike(tensors: Tensors) -> None:
    for matrix in experts(tensors, "gate") + experts(tensors, "up"):
        matrix[1:] = matrix[:1] * torch.linspace(0.5, 2, len(matrix) - 1)[:, None]


def _silent(tensors: Tensors) -> None:
    for up in experts(tensors, "up"):
        up.zero_()


def _one_token(tensors: Tensors) -> None:
    """Every token is the same."""
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:] = tensor[:1]


def _unseen(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[5:] = 0


DAMAGES = [_down_of_zero, _all_alike, _silent, _one_token, _unseen]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("change", DAMAGES)
def test_degenerate_experts_end_no_worse_than_by_the_paper(
    text: Path, tmp_path: Path, change: Callable[[Tensors], None], plan: str
) -> None:
    model = save(tmp_path / "model", change)
    ours, theirs = losses(model, text, tmp_path, PLANS[plan], MUCH)
    assert ours <= theirs + 1e-6


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("given", [LEAST, LITTLE], ids=str)
def test_next_to_no_text_ends_no_worse_than_by_the_paper(
    text: Path, tmp_path: Path, given: tuple[int, int], plan: str
) -> None:
    model = save(tmp_path / "model", lambda tensors: None)
    ours, theirs = losses(model, text, tmp_path, PLANS[plan], given)
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_a_window_of_two_tokens_is_enough_for_any_form(
    text: Path, tmp_path: Path, family: str
) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    compress(model, tmp_path / "out", recipe(text, LEAST, bits_per_weight=5, allow=(16, 4, 2, 0)))
    verify(tmp_path / "out", against=model)


def test_coefficients_whose_products_overflow_are_ranked_by_energy_and_told(
    text: Path, tmp_path: Path
) -> None:
    def large(tensors: Tensors) -> None:
        for up, down in zip(experts(tensors, "up"), experts(tensors, "down"), strict=True):
            up *= 1.2e18
            down /= 1.2e18

    model = save(tmp_path / "model", large)
    report = compress(model, tmp_path / "out", recipe(text, MUCH, plan=PLANS["prune"]))
    (layer,) = report.layers
    assert layer.ranked_by_energy
    assert verify(tmp_path / "out", against=model)


@pytest.mark.parametrize("goal", [{"plan": PLANS["prune"]}, {"bits_per_weight": 3}])
def test_a_report_names_by_step_what_was_left_out(
    text: Path, tmp_path: Path, goal: dict[str, Any]
) -> None:
    model = save(tmp_path / "model", lambda tensors: None)
    report = compress(model, tmp_path / "out", recipe(text, LITTLE, **goal))
    written = (tmp_path / "out" / "camera_report.json").read_text()
    assert CompressionReport.model_validate_json(written) == report
    (layer,) = report.layers
    few = {e for e, tokens in enumerate(layer.tokens_per_expert) if tokens < 32}
    assert few
    if "plan" in goal:
        assert set(layer.ranked_by_energy) == few
        assert layer.rounded_experts == layer.uncompensated_experts == ()
    else:
        assert few <= set(layer.rounded_experts)
        assert layer.ranked_by_energy == ()
        # What is rounded to nearest is not to be fitted.
        assert not few & set(layer.uncompensated_experts)
