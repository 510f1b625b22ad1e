"""What layers lost, as the report has it: against transformers' own experts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.progress import Progress
from tests import pruning, tiny_models
from tests.compression.test_pipeline import files_of
from tests.quantized import dequantized


def _recipe(text: Path, **settings: object) -> Recipe:
    calibration = Calibration(source=str(text), samples=8, seq_len=64)
    shared: dict[str, object] = {"calibration": calibration, "align": 1, "group_size": 32}
    return Recipe.model_validate(shared | {"dtype": "float32"} | settings)


@torch.no_grad()
def _error(dense: Path, made: torch.nn.Module, tokens: torch.Tensor) -> float:
    """‖y - ŷ‖² / Σ E of the first MoE layer, on the last eighth of the tokens."""
    structure = pruning.structure_of(dense)
    original = tiny_models.load(dense, dtype=torch.float32, experts_implementation="eager")
    layer = structure.moe_layers[0]
    moes = [pruning.moe_of(model, structure, layer) for model in (original, made)]
    given: list[torch.Tensor] = []
    moes[0].register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    original(tokens)
    x = given[0].flatten(0, 1)
    x = x[len(x) - len(x) // 8 :]
    outputs = []
    for moe in moes:
        out = moe(x[None])
        outputs.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1).double())
    shared = getattr(moes[0], structure.modules.shared_name) if structure.shared_d_ff else None
    return float((outputs[0] - outputs[1]).square().sum()) / _energy(moes[0], shared, x)


def _energy(moe: Any, shared: Any, x: torch.Tensor) -> float:
    """Each micro-expert alone, with all others at zero."""
    total = 0.0
    downs = moe.experts.down_proj
    whole = downs.clone()
    kept = shared.down_proj.weight.clone() if shared else None
    if shared:
        shared.down_proj.weight.zero_()
    for number in range(downs.shape[2]):
        for expert in range(len(downs)):
            downs.zero_()
            downs[expert, :, number] = whole[expert, :, number]
            total += _squares(moe, x)
    downs.zero_()
    for number in range(kept.shape[1] if shared else 0):
        shared.down_proj.weight.zero_()
        shared.down_proj.weight[:, number] = kept[:, number]
        total += _squares(moe, x)
    downs.copy_(whole)
    if shared:
        shared.down_proj.weight.copy_(kept)
    return total


def _squares(moe: torch.nn.Module, x: torch.Tensor) -> float:
    out = moe(x[None])
    return float((out[0] if isinstance(out, tuple) else out).double().square().sum())


@pytest.mark.parametrize("family", ["qwen2_moe", "laguna"])
@pytest.mark.parametrize("plan", ["16:0.5,0:0.5", "3:0.5,1:0.3,0:0.2"])
def test_the_error_of_a_layer_is_that_of_its_output(
    tmp_path: Path, text: Path, family: str, plan: str
) -> None:
    dense = tiny_models.save(family, tmp_path / "dense", dtype=torch.float32)
    asked = _recipe(text, plan=TierPlan.parse(plan))
    report = compress(dense, tmp_path / "out", asked)
    made = dequantized(dense, tmp_path / "out")
    tokens = windows_for(Checkpoint.open(dense), asked.calibration).tokens
    wanted = _error(dense, made, tokens)
    assert report.layers[0].output_error == pytest.approx(wanted, rel=1e-2)


def test_what_is_expected_is_near_to_what_is_found(tmp_path: Path, text: Path) -> None:
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense", dtype=torch.float32)
    found = {}
    for bits in (1.5, 3.25):
        report = compress(dense, tmp_path / f"{bits}", _recipe(text, bits_per_weight=bits))
        for layer in report.layers:
            assert layer.predicted_error and layer.output_error
            assert 0.2 < layer.output_error / layer.predicted_error < 5
        found[bits] = report.layers[0]
    assert found[1.5].predicted_error > found[3.25].predicted_error
    assert found[1.5].output_error > found[3.25].output_error


def test_the_published_algorithm_reports_neither(tmp_path: Path, text: Path) -> None:
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense", dtype=torch.float32)
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    asked = Recipe.paper(plan=TierPlan.prune(0.5), calibration=calibration)
    report = compress(dense, tmp_path / "out", asked)
    assert all(layer.output_error is None is layer.predicted_error for layer in report.layers)
    written = (tmp_path / "out" / "camera_report.json").read_text()
    assert "output_error" not in written and "predicted_error" not in written


def test_a_size_resumes_to_the_same_bytes_after_it_was_measured(tmp_path: Path, text: Path) -> None:
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense", dtype=torch.float32)
    calibration = Calibration(source=str(text), samples=20, seq_len=128)
    asked = _recipe(text, bits_per_weight=2.5, calibration=calibration)
    compress(dense, tmp_path / "whole", asked)
    stops = [("survey", 1), ("survey", 2), ("compress", 1)]

    def stop(progress: Progress) -> None:
        if stops and (progress.step, progress.done) == stops[0]:
            del stops[0]
            raise KeyboardInterrupt

    for _ in range(len(stops)):
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "out", asked, resume=True, on_progress=stop)
    compress(dense, tmp_path / "out", asked, resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
