"""A transformers that calls quantizers in another way is named at import, before a model loads."""

import sys
from typing import Any

import pytest
import transformers
from transformers import core_model_loading
from transformers.quantizers.base import HfQuantizer

from camera_serve.errors import CameraError
from camera_serve.hf import CameraHfQuantizer
from camera_serve.hf.contract import check_overrides

THIS = f"transformers {transformers.__version__} does not fit"


def test_the_installed_transformers_fits() -> None:
    check_overrides(CameraHfQuantizer, HfQuantizer)


class Ours:
    def update_tp_plan(self, config: Any) -> None: ...

    def update_attn_implementation(self, config: Any) -> None: ...

    def convert(self, conversions: Any, model: Any = None) -> None: ...


def theirs(**methods: Any) -> type:
    fitting = {"update_tp_plan": lambda self, config: None, "convert": lambda self, first: None}
    return type("HfQuantizer", (), fitting | methods)


@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"convert": lambda self, conversions, model: None},
        {"convert": lambda self, conversions, model, **more: None},
        {"update_attn_implementation": lambda self, config: None},
        {"another": lambda self, whatever: None},
    ],
)
def test_calls_that_ours_take(methods: dict[str, Any]) -> None:
    check_overrides(Ours, theirs(**methods))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"convert": lambda self, conversions, model, files: None}, "conversions, model, files"),
        ({"convert": lambda self, conversions, *, files: None}, "convert.*files"),
        ({"convert": lambda self: None}, "convert"),
    ],
)
def test_calls_that_ours_do_not_take_are_shown(methods: dict[str, Any], message: str) -> None:
    with pytest.raises(CameraError, match=f"{THIS}.*{message}"):
        check_overrides(Ours, theirs(**methods))


@pytest.mark.parametrize("name", ["convert", "update_tp_plan"])
def test_methods_that_nothing_calls_are_named(name: str) -> None:
    base = theirs()
    delattr(base, name)
    with pytest.raises(CameraError, match=f"{THIS}.*has no .*{name}"):
        check_overrides(Ours, base)


def test_a_name_that_is_gone_is_said_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("camera_serve.hf", "camera_serve.hf.quantizer"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(core_model_loading, "WeightConverter")
    with pytest.raises(CameraError, match=f"{THIS}.*WeightConverter.*install 5"):
        import camera_serve.hf  # noqa: F401
