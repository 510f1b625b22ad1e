import shutil
from pathlib import Path
from typing import Any

import pytest

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import UnsupportedModelError
from tests import tiny_models
from tests.editing import edit_config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_models.save(family, folder / family) for family in tiny_models.FORMS}


def _edited(model: Path, output: Path, **changes: Any) -> Path:
    """A copy with settings changed where the config says what its experts are."""
    shutil.copytree(model, output)
    edit_config(output, lambda config: config.get("text_config", config).update(changes))
    return output


@pytest.mark.parametrize("family", tiny_models.FORMS)
@pytest.mark.parametrize(
    "limits", [{"swiglu_limit": 7.0}, {"swiglu_limits": [0, 7.0]}, {"swiglu_alpha": 1.702}]
)
def test_a_limit_that_transformers_does_not_read_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, family: str, limits: dict[str, Any]
) -> None:
    model = _edited(models[family], tmp_path / "model", **limits)
    with pytest.raises(UnsupportedModelError, match=f"with {next(iter(limits))} = .* would clamp"):
        Checkpoint.open_unchecked(model)


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_limits_that_limit_nothing_are_none(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    nothing = {"swiglu_limit": None, "swiglu_limits": [0, 0.0], "swiglu_alpha": 0}
    Checkpoint.open_unchecked(_edited(models[family], tmp_path / "model", **nothing))


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_two_numbers_of_experts_are_refused(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    counts = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8}
    Checkpoint.open_unchecked(_edited(models[family], tmp_path / "same", **counts))
    model = _edited(models[family], tmp_path / "model", **{**counts, "num_local_experts": 16})
    with pytest.raises(UnsupportedModelError, match=r"num_local_experts is 16.*: two numbers"):
        Checkpoint.open_unchecked(model)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_a_text_part_of_another_model_type_is_refused(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = _edited(models[family], tmp_path / "model", model_type="llama")
    with pytest.raises(UnsupportedModelError, match=r"text_config\.model_type is 'llama': wanted"):
        Checkpoint.open_unchecked(model)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "lfm2_moe"])
def test_shared_experts_that_the_family_has_not_are_refused(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = _edited(models[family], tmp_path / "model", n_shared_experts=1)
    with pytest.raises(UnsupportedModelError, match=r"n_shared_experts = 1 .* no shared experts"):
        Checkpoint.open_unchecked(model)


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k25"])
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"n_group": 3, "topk_group": 1}, r"n_group is 3: 8 experts .* 3 groups of one size"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3 in config.json: wanted 1 to 2"),
        ({"n_group": 8, "topk_group": 2}, r"topk_group is 2: .* 2 experts, .* takes 3"),
    ],
)
def test_groups_that_the_experts_do_not_make_are_refused(
    models: dict[str, Path], tmp_path: Path, family: str, groups: dict[str, Any], message: str
) -> None:
    model = _edited(models[family], tmp_path / "model", **groups)
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open_unchecked(model)
