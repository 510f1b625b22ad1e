from pathlib import Path

import pytest
from pydantic import ValidationError

from camera_serve.errors import RecipeError
from camera_serve.recipe import Calibration, Recipe, TierPlan

RECIPE = Recipe.paper(plan=TierPlan.prune(0.4), calibration=Calibration(source="text.txt"))


def test_prune_is_short_for_a_plan_of_16_and_0_bits() -> None:
    assert TierPlan.prune(0.4) == TierPlan.parse("16:0.6,0:0.4")
    assert TierPlan.prune(0.4).pruned == 0.4
    assert TierPlan.prune(0.4).bits == (16,)


def test_a_plan_prints_as_it_is_parsed() -> None:
    assert str(TierPlan.parse("16:0.75,0:0.25")) == "16:0.75,0:0.25"


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused_with_its_value(share: float) -> None:
    with pytest.raises(RecipeError, match=f"--prune is {share}"):
        TierPlan.prune(share)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16:0.6,0:0.3", "must sum to 1, found 0.9"),
        ("0:0.4,16:0.6", r"must fall from tier to tier, found \[0, 16\]"),
        ("16:0.5,16:0.5", r"must fall from tier to tier, found \[16, 16\]"),
        ("5:1", "5 bits cannot be served"),
        ("0:1", "prunes whole layers"),
        ("16", "is not a list of BITS:SHARE"),
        ("16:x", "is not a list of BITS:SHARE"),
        ("16:1.5,0:-0.5", "tiers|fraction"),
        ("", "is not a list of BITS:SHARE"),
    ],
)
def test_a_wrong_plan_is_refused_with_what_was_read(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TierPlan.parse(text)


@pytest.mark.parametrize("bits", range(4, 16))
def test_an_average_without_served_neighbours_is_refused_with_a_plan_that_has_it(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"tiers of {bits + 1}, {bits} and {bits - 1}") as error:
        TierPlan.mixed(bits, 0.2)
    plan = TierPlan.parse(str(error.value).rpartition(" ")[2])
    assert sum(tier.bits * tier.fraction for tier in plan.tiers) == pytest.approx(bits)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_an_average_is_kept_by_its_three_tiers(bits: int) -> None:
    plan = TierPlan.mixed(bits, 0.2)
    assert [tier.bits for tier in plan.tiers] == [bits + 1, bits, bits - 1]
    assert [tier.fraction for tier in plan.tiers] == pytest.approx([0.2, 0.6, 0.2])


def test_a_recipe_survives_its_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.dump())
    assert Recipe.load(file) == RECIPE


def test_an_unknown_setting_in_a_recipe_is_an_error_naming_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.dump() + "lambda: 0.4\n")
    with pytest.raises(RecipeError, match="lambda: Extra inputs are not permitted"):
        Recipe.load(file)


@pytest.mark.parametrize(("content", "message"), [("[1", "is not YAML"), ("3", "is none")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(file)


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RECIPE.alpha = 0.5  # type: ignore[misc]


def test_a_setting_that_older_versions_do_not_know_is_written_where_it_is_used() -> None:
    assert "polish" not in RECIPE.dump()
    assert "polish: true" in RECIPE.model_copy(update={"polish": True}).dump()


@pytest.mark.parametrize(
    "text", ["[1, 2]", "model_type: qwen2_moe\ndtype: float16\nhidden_size: 64\n", "", "a"]
)
def test_a_file_that_is_no_recipe_is_told_in_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match="is none: it holds other settings than those of a run"):
        Recipe.load(file)


def test_sweeps_begin_with_a_refit_of_16_bits() -> None:
    for changes, why in (
        ({"refit": False}, "set refit to true"),
        ({"plan": "2:1"}, "keep 16 bits"),
    ):
        settings = {
            "plan": "16:0.5,0:0.5",
            "calibration": RECIPE.calibration,
            "sweeps": 1,
        } | changes
        with pytest.raises(ValidationError, match=why):
            Recipe(**settings | {"plan": TierPlan.parse(str(settings["plan"]))})
