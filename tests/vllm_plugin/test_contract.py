"""What the plugin relies on holds in the installed vLLM, and each break of it is named."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import compat, contract, moe

ITEMS = [(module, name) for module, names in contract.NAMES.items() for name in names]
ATTRIBUTES = [(place, name) for place, names in contract.READ.items() for name in names]


def test_the_installed_vllm_keeps_the_contract() -> None:
    assert list(contract.broken_items()) == []


def test_a_small_layer_comes_out_as_in_plain_torch() -> None:
    with set_current_vllm_config(VllmConfig()):
        assert contract.small_layer_error() <= contract.TOLERANCE


@pytest.mark.parametrize(("module", "name"), ITEMS, ids=lambda value: value.rpartition(".")[2])
def test_a_missing_name_is_named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, _, last = name.rpartition(".")
    owner: Any = import_module(module)
    owner = getattr(owner, holder) if holder else owner
    find = contract._find
    hidden = lambda m, n: None if (m, n) == (module, name) else find(m, n)  # noqa: E731
    monkeypatch.setattr(contract, "_find", hidden)
    assert hasattr(owner, last)
    assert f"{module} has no {name}" in list(contract.broken_items())


@pytest.mark.parametrize(("place", "name"), ATTRIBUTES)
def test_an_attribute_that_is_no_longer_set_is_named(
    place: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = contract._code_of
    monkeypatch.setattr(contract, "_code_of", lambda found: source(found).replace(name, "other"))
    broken = list(contract.broken_items())
    assert f"{place.replace(':', '.')} knows no {name}" in broken


@pytest.mark.parametrize("place", contract.CALLED)
def test_a_function_with_other_arguments_is_named(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(unknown: object) -> None: ...

    find = contract._find
    module, name = place.split(":")
    changed = lambda m, n: other if (m, n) == (module, name) else find(m, n)  # noqa: E731
    monkeypatch.setattr(contract, "_find", changed)
    (broken,) = [item for item in contract.broken_items() if "does not take" in item]
    assert broken.startswith(place.replace(":", "."))


def more(self: object, layer: object, another: object, third: object) -> None: ...


@pytest.mark.parametrize(
    ("base", "name", "changed"),
    [
        (FusedMoEMethodBase, "process_weights_after_loading", more),
        (FusedMoEMethodBase, "get_fused_moe_quant_config", more),
        (QuantizationConfig, "get_quant_method", more),
    ],
)
def test_a_method_that_is_called_in_another_way_is_named(
    base: type, name: str, changed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, name, changed)
    wanted = f"{base.__name__} calls {name}(self: object, layer: object, another: object"
    assert any(item.startswith(wanted) for item in contract.broken_items())


def test_an_abstract_method_that_is_new_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.CameraMoEMethod, "__abstractmethods__", frozenset({"renew"}))
    assert "FusedMoEMethodBase wants renew" in list(contract.broken_items())


def test_a_layer_that_comes_out_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "small_layer_error", lambda: 0.25)
    compat.check_small_layer.cache_clear()
    compat.check_small_layer()
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    compat.check_small_layer.cache_clear()
    with pytest.raises(ServingError, match=r"vLLM 0\.34\.0 is newer .* comes out 25\.0% off"):
        compat.check_small_layer()
    compat.check_small_layer.cache_clear()
