"""One analysis for many compressions: the same bytes, or a sentence that says why not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from camera_serve import (
    AnalysisSettings,
    Calibration,
    Recipe,
    TierPlan,
    analyze,
    compress,
    estimate,
)
from camera_serve.checkpoint.entries import DTYPES
from camera_serve.checkpoint.format import Tiers, expert_shapes
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.compression.allocation import least_bytes
from camera_serve.compression.sizing import allocate, allocation_for, micro_expert_costs
from camera_serve.compression.stored_analysis import StoredAnalysis
from camera_serve.errors import AnalysisError, CalibrationError, RecipeError
from camera_serve.models import MoeStructure
from camera_serve.progress import Progress
from camera_serve.ranking.survey import LayerSurvey
from tests import tiny_models
from tests.editing import digest, edit_config

ALIGN, GROUP = 4, 32
AGAIN = "run camera-serve analyze again"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def analysis(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("analysis") / "out"
    analyze(model, output, AnalysisSettings(calibration=windows(text)))
    return output


@pytest.fixture
def damaged(analysis: Path, tmp_path: Path) -> Path:
    """A copy of the analysis, to be damaged."""
    return Path(shutil.copytree(analysis, tmp_path / "analysis"))


def windows(text: Path, **changes: Any) -> Calibration:
    return Calibration(**({"source": str(text), "samples": 6, "seq_len": 64} | changes))


def asked(text: Path, **settings: Any) -> Recipe:
    own = {"calibration": windows(text), "align": ALIGN, "group_size": GROUP}
    return Recipe(**(own | settings))


def written(folder: Path) -> dict[str, str]:
    return {name: found for name, found in digest(folder).items() if name != "camera.log"}


GOALS: dict[str, dict[str, Any]] = {
    "pruning": {"plan": TierPlan.prune(0.4)},
    "packed": {"plan": TierPlan.parse("3:0.2,2:0.6,1:0.2")},
    "bits": {"bits_per_weight": 2.5},
    "size": {"size": 300_000},
    "removal alone": {"bits_per_weight": 9, "allow": (16, 0)},
    "by energy": {"plan": TierPlan.prune(0.4), "elimination": False},
    "by layer": {"plan": TierPlan.prune(0.4), "budget": "layer"},
}


@pytest.mark.parametrize("goal", GOALS)
def test_an_analysis_gives_the_bytes_of_a_pass_of_its_own(
    model: Path, text: Path, analysis: Path, tmp_path: Path, goal: str
) -> None:
    wanted, before = asked(text, **GOALS[goal]), digest(analysis)
    report = compress(model, tmp_path / "own", wanted)
    seen: list[Progress] = []
    again = compress(model, tmp_path / "given", wanted, analysis=analysis, on_progress=seen.append)
    assert {progress.step for progress in seen} == {"compress"}
    assert again == report
    assert written(tmp_path / "given") == written(tmp_path / "own")
    assert f"survey: that of {analysis}" in (tmp_path / "given" / "camera.log").read_text()
    assert digest(analysis) == before


@pytest.mark.parametrize("goal", ["packed", "bits", "removal alone", "by energy"])
def test_a_dry_run_with_an_analysis_is_right_to_the_byte(
    model: Path, text: Path, analysis: Path, tmp_path: Path, goal: str
) -> None:
    wanted = asked(text, **GOALS[goal])
    limit, found = estimate(model, wanted), estimate(model, wanted, analysis=analysis)
    report = compress(model, tmp_path / "out", wanted, analysis=analysis)
    assert found.expert_bytes_after == report.expert_bytes_after
    assert found.output_bytes == report.total_bytes_after
    assert limit.output_bytes - limit.spare_bytes <= found.output_bytes <= limit.output_bytes
    assert found.allocation and limit.allocation is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = dict.fromkeys(found.allocation.micro_experts, 0)
    for layer in config["layers"].values():
        for tiers in layer["experts"] + layer["shared"]:
            for bits, count in zip(config["bits"], tiers, strict=True):
                kept[bits] += count
    kept[0] = 2 * (8 * 64 + 96) - sum(kept.values())
    assert found.allocation.micro_experts == kept
    assert 0 < found.allocation.expected_loss < 1


def test_fewer_bytes_are_expected_to_lose_more(model: Path, text: Path, analysis: Path) -> None:
    losses = []
    for bits in (1.5, 2.25, 3.25, 6.0):
        found = estimate(model, asked(text, bits_per_weight=bits), analysis=analysis)
        assert found.allocation
        losses.append(found.allocation.expected_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 1 and losses[-1] > 0


@pytest.mark.parametrize(
    ("stop", "first", "then"),
    [
        (("survey", 1), False, True),
        (("compress", 1), False, True),
        (("compress", 1), True, False),
        (("compress", 1), True, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("goal", ["pruning", "bits"])
def test_a_run_resumes_with_or_without_its_analysis(
    model: Path,
    text: Path,
    analysis: Path,
    tmp_path: Path,
    first: bool,
    then: bool,
    goal: str,
    stop: tuple[str, int],
) -> None:
    wanted, seen = asked(text, **GOALS[goal]), list[Progress]()

    def interrupt(progress: Progress) -> None:
        if (progress.step, progress.done) == stop:
            raise KeyboardInterrupt

    compress(model, tmp_path / "whole", wanted)
    output = tmp_path / "out"
    given = {True: analysis, False: None}
    with pytest.raises(KeyboardInterrupt):
        compress(model, output, wanted, analysis=given[first], on_progress=interrupt)
    compress(model, output, wanted, analysis=given[then], resume=True, on_progress=seen.append)
    assert {progress.step for progress in seen} == {"compress"}
    assert seen[0].done == (1 if stop[0] == "compress" else 0)
    assert all(progress.eta is None or progress.eta >= 0 for progress in seen)
    assert written(output) == written(tmp_path / "whole")


def test_activations_of_a_finished_survey_are_not_kept(
    model: Path, text: Path, tmp_path: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if (progress.step, progress.done) == ("compress", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", asked(text, bits_per_weight=3), on_progress=interrupt)
    state = tmp_path / "out.partial" / ".state"
    assert load_file(state / "surveyed.safetensors")["hidden"].numel() == 0
    assert load_file(state / "hidden.safetensors")["hidden"].numel() > 0


def other_model(model: Path, text: Path, folder: Path) -> tuple[Path, Recipe]:
    again = Path(shutil.copytree(model, folder / "model"))
    edit_config(again, lambda config: config.update(rms_norm_eps=1e-3))
    return again, asked(text, bits_per_weight=3)


def other_text(model: Path, text: Path, folder: Path) -> tuple[Path, Recipe]:
    (folder / "other.txt").write_text(text.read_text().replace("a", "e"))
    return model, asked(folder / "other.txt", bits_per_weight=3)


def with_windows(**changes: Any) -> Callable[[Path, Path, Path], tuple[Path, Recipe]]:
    return lambda model, text, folder: (
        model,
        asked(text, bits_per_weight=3, calibration=windows(text, **changes)),
    )


def other_dtype(model: Path, text: Path, folder: Path) -> tuple[Path, Recipe]:
    return model, asked(text, bits_per_weight=3, dtype="float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_model, "file config.json of the model differs: use the model of that run"),
        (other_text, "the calibration text gives other tokens: use the text of that run"),
        (with_windows(samples=5), "calibration.samples: then 6, now 5"),
        (with_windows(seq_len=32), "calibration.seq_len: then 64, now 32"),
        (with_windows(seed=1), "calibration.seed: then 0, now 1"),
        (other_dtype, "dtype: then bfloat16, now float32 (--dtype bfloat16)"),
    ],
)
def test_an_analysis_of_other_inputs_is_refused_by_what_differs(
    model: Path,
    text: Path,
    analysis: Path,
    tmp_path: Path,
    change: Callable[[Path, Path, Path], tuple[Path, Recipe]],
    words: str,
) -> None:
    source, wanted = change(model, text, tmp_path)
    for run in (
        lambda: compress(source, tmp_path / "out", wanted, analysis=analysis),
        lambda: estimate(source, wanted, analysis=analysis),
    ):
        with pytest.raises(AnalysisError) as found:
            run()
        assert str(found.value) == (
            f"{analysis} was made from other inputs: {words}; compress with the inputs of that "
            f"analysis, {AGAIN}, or leave out --analysis"
        )
    assert not list(tmp_path.glob("out*"))


def edited_report(folder: Path, **changes: Any) -> None:
    file = folder / "camera_analysis.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edited_survey(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "survey.safetensors")
        change(tensors)
        save_file(tensors, folder / "survey.safetensors")

    return edit


def truncated(folder: Path) -> None:
    file = folder / "survey.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def one_bit(folder: Path) -> None:
    file = folder / "survey.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def other_version(folder: Path) -> None:
    print_ = json.loads((folder / "camera_analysis.json").read_text())["fingerprint"]
    edited_report(folder, fingerprint=print_ | {"camera-serve": "0.1"})


def of_version_1(folder: Path) -> None:
    report = json.loads((folder / "camera_analysis.json").read_text())
    del report["fingerprint"], report["survey_sha256"]
    (folder / "camera_analysis.json").write_text(json.dumps(report | {"version": 1}))
    (folder / "survey.safetensors").unlink()


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


SECOND = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "survey.safetensors is missing, truncated or damaged"),
        (one_bit, "survey.safetensors is damaged: its SHA-256 begins"),
        (lambda folder: (folder / "survey.safetensors").unlink(), "is missing, truncated"),
        (
            edited_survey(lambda t: t[f"{SECOND}.costs"][3:5].fill_(torch.nan)),
            f"2 of 608 values of {SECOND}.costs are NaN or Inf",
        ),
        (
            edited_survey(lambda t: t[f"{SECOND}.experts"][0].fill_(torch.inf)),
            f"64 of 512 values of {SECOND}.experts are NaN or Inf",
        ),
        (
            edited_survey(lambda t: t.pop(f"{SECOND}.order")),
            f"lacks {SECOND}.order: it has order of 1 layers, the model has 2 MoE layers",
        ),
        (
            edited_survey(lambda t: t.update({f"{SECOND}.order": torch.arange(5)})),
            f"{SECOND}.order is int64 [5], wanted int64 [608]",
        ),
        (
            edited_survey(lambda t: t[f"{SECOND}.order"][64:66].fill_(7)),
            f"{SECOND}.order does not name each of the 64 micro-experts of expert 1 once",
        ),
        (
            lambda folder: (folder / "camera_analysis.json").write_text("{"),
            "camera_analysis.json cannot be read as JSON",
        ),
        (
            lambda folder: edited_report(folder, layers=3),
            "camera_analysis.json is no report of an analysis: layers:",
        ),
        (
            lambda folder: edited_report(folder, version=7, more=1),
            "is of version 7, and this camera-serve reads 2: use a newer camera-serve",
        ),
        (of_version_1, "camera_analysis.json is of version 1, which has no survey"),
        (other_version, "camera-serve: then 0.1, now"),
        (lambda folder: edited_report(folder, fingerprint={}), "by another version of camera"),
        (no_folder, "is no folder: give a folder that camera-serve analyze wrote"),
        (a_file, "is no folder: give a folder that camera-serve analyze wrote"),
        (
            lambda folder: (folder / "camera_analysis.json").unlink(),
            "holds no camera_analysis.json: give a folder that camera-serve analyze wrote",
        ),
    ],
)
def test_a_damaged_analysis_is_refused_by_what_is_wrong(
    model: Path,
    text: Path,
    damaged: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    words: str,
) -> None:
    damage(damaged)
    wanted = asked(text, bits_per_weight=3)
    with pytest.raises(AnalysisError) as found:
        compress(model, tmp_path / "out", wanted, analysis=damaged)
    said = str(found.value)
    assert said.startswith(str(damaged)) and words in said and "\n" not in said
    assert AGAIN in said or "give a folder" in said
    assert not list(tmp_path.glob("out*"))


def test_a_text_that_is_gone_is_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    own = Path(shutil.copyfile(text, tmp_path / "text.txt"))
    analyze(model, tmp_path / "analysis", AnalysisSettings(calibration=windows(own)))
    own.unlink()
    with pytest.raises(CalibrationError, match=r"text\.txt does not exist, and compress needs"):
        compress(
            model,
            tmp_path / "out",
            asked(own, bits_per_weight=3),
            analysis=tmp_path / "analysis",
        )


@pytest.mark.parametrize(
    "wanted",
    [
        {"plan": TierPlan.prune(0.4), "version": 2},
        {"plan": TierPlan.parse("2:1"), "budget": "layer"},
    ],
)
def test_a_recipe_that_makes_no_survey_takes_none(
    model: Path, text: Path, analysis: Path, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="--analysis stands for a pass over the whole model"):
        compress(model, tmp_path / "out", asked(text, **wanted), analysis=analysis)


@pytest.fixture(scope="module", params=tiny_models.FORMS)
def analyzed(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[LayerSurvey]]:
    """A model of each form, and its survey."""
    folder = tmp_path_factory.mktemp("forms")
    tiny_models.save(request.param, folder / "model")
    few = windows(text, samples=2)
    analyze(folder / "model", folder / "analysis", AnalysisSettings(calibration=few))
    checkpoint = Checkpoint.open(folder / "model")
    surveys = StoredAnalysis.open(folder / "analysis").surveys(checkpoint.structure)
    return checkpoint, [*surveys.values()]


ITEMSIZE = {"weight": 2, "qweight": 4, "scales": 2, "zeros": 2}


def bytes_of(checkpoint: Checkpoint, recipe: Recipe, surveys: list[LayerSurvey]) -> int:
    """What the tensors of a checkpoint take, by the shapes that its format gives them."""
    experts = checkpoint.expert_names
    others = [entry for name, entry in checkpoint.entries.items() if name not in experts]
    total = sum(torch.Size(e.shape).numel() * DTYPES[e.dtype].itemsize for e in others)
    structure = checkpoint.structure
    selections = allocate(checkpoint, recipe, surveys)
    for layer, selection in zip(structure.moe_layers, selections, strict=True):
        tiers = Tiers(selection.bits, recipe.group_size)
        for name, shape in expert_shapes(structure, layer, selection.layout, tiers).items():
            total += torch.Size(shape).numel() * ITEMSIZE[name.rpartition(".")[2]]
    return total


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    share=st.floats(0, 1),
    allowed=st.sets(st.sampled_from([16, 8, 4, 3, 2, 1]), min_size=1),
    removes=st.booleans(),
    align=st.sampled_from([1, 4, 8]),
    by_bits=st.booleans(),
)
def test_a_size_is_met_by_models_of_every_form(
    text: Path,
    analyzed: tuple[Checkpoint, list[LayerSurvey]],
    share: float,
    allowed: set[int],
    removes: bool,
    align: int,
    by_bits: bool,
) -> None:
    checkpoint, surveys = analyzed
    structure = checkpoint.structure
    wanted = asked(text, size=1, align=align, allow=falling(allowed, removes))
    costs = micro_expert_costs(checkpoint, wanted)
    counts = [structure.micro_experts_per_layer] * len(structure.moe_layers)
    least, most = least_bytes(counts, costs, align), max(costs.values()) * sum(counts)
    budget = least + round(share * (most - least))
    limit = checkpoint.total_bytes - checkpoint.expert_bytes + budget
    goal: dict[str, Any] = {"size": limit}
    if by_bits:
        weights = sum(counts) * 3 * structure.d_model
        goal = {"bits_per_weight": min(16, 8 * (budget + 0.5) / weights)}
    wanted = asked(text, align=align, allow=wanted.allow, **goal)
    found = bytes_of(checkpoint, wanted, surveys)
    assert limit - max(0.001 * limit, align * max(costs.values())) < found <= limit
    exact = allocation_for(checkpoint, wanted, surveys)
    assert sum(exact.micro_experts.values()) == sum(counts)
    assert removes or not exact.micro_experts.get(0, 0)


def falling(allowed: set[int], removes: bool) -> tuple[int, ...]:
    return (*sorted(allowed, reverse=True), *([0] if removes else []))


@pytest.mark.parametrize("size", [180_000, 250_000, 400_000])
def test_a_size_is_that_of_the_tensors_in_the_files(
    model: Path, text: Path, analysis: Path, tmp_path: Path, size: int
) -> None:
    wanted = asked(text, size=size)
    compress(model, tmp_path / "out", wanted, analysis=analysis)
    files = (tmp_path / "out").glob("*.safetensors")
    found = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    checkpoint = Checkpoint.open(model)
    surveys = StoredAnalysis.open(analysis).surveys(checkpoint.structure)
    assert found == bytes_of(checkpoint, wanted, [*surveys.values()])
    step = ALIGN * max(micro_expert_costs(checkpoint, wanted).values())
    assert size - step < found <= size


def test_a_run_goes_on_with_the_survey_that_it_was_begun_with(
    model: Path, text: Path, analysis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asked(text, **GOALS["bits"])

    def interrupt(progress: Progress) -> None:
        if (progress.step, progress.done) == ("compress", 1):
            raise KeyboardInterrupt

    compress(model, tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", wanted, on_progress=interrupt)
    # As if it had found something else on all tokens.
    surveys = StoredAnalysis.surveys

    def others(stored: StoredAnalysis, structure: MoeStructure) -> dict[int, LayerSurvey]:
        found = surveys(stored, structure)
        return {layer: replace(own, weight=own.weight * 10**layer) for layer, own in found.items()}

    monkeypatch.setattr(StoredAnalysis, "surveys", others)
    compress(model, tmp_path / "out", wanted, analysis=analysis, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
