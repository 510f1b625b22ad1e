"""What the plugin relies on in vLLM: it holds here, and every part of it is noticed when broken."""

import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin import contract, methods
from camera_serve.vllm_plugin.config import CameraConfig
from camera_serve.vllm_plugin.moe import CameraMoEMethod
from camera_serve.vllm_plugin.trial import try_layer
from tests.vllm_plugin.experts import camera_config, make_layer, moe_config, random_experts

UNTESTED = f"{contract.NEWEST[0]}.{contract.NEWEST[1] + 1}.0"
NEWEST = f"{contract.NEWEST[0]}.{contract.NEWEST[1]}.0"
MEMBERS = [(path, name) for path, names in contract.MEMBERS.items() for name in names]
HOOKS = [(theirs, ours, n) for (theirs, ours), names in contract.HOOKS.items() for n in names]


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """Put something else where `package.module:Class.attribute` is found."""

    def put(path: str, value: object) -> None:
        module, _, names = path.partition(":")
        *owners, last = names.split(".")
        owner = import_module(module)
        for name in owners:
            owner = getattr(owner, name)
        monkeypatch.setattr(owner, last, value)

    return put


assert methods  # Imported before anything is patched: it would keep what it finds.


def changed(self: object, novel: object) -> None:
    """A function of vLLM's that is called otherwise now."""


def test_it_holds_in_the_vllm_that_is_installed() -> None:
    assert contract.changes() == []
    assert not contract.is_untested(vllm.__version__)


@pytest.mark.parametrize(("theirs", "ours", "name"), HOOKS)
def test_a_hook_that_is_called_otherwise_is_named(
    theirs: str, ours: str, name: str, replace: Callable[[str, object], None]
) -> None:
    replace(f"{theirs}.{name}", changed)
    assert any(found.startswith(f"{theirs}.{name}: ") for found in contract.changes())


def test_an_argument_that_is_new_is_named(replace: Callable[[str, object], None]) -> None:
    def apply(
        self: object,
        layer: object,
        x: object,
        topk_weights: object,
        topk_ids: object,
        shared_experts: object,
        shared_experts_input: object,
        novel: object,
    ) -> None: ...

    path = "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply"
    replace(path, apply)
    assert contract.changes() == [f"{path}: got an unexpected keyword argument 'novel'"]


def test_a_method_that_must_be_there_now_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CameraMoEMethod, "__abstractmethods__", frozenset({"novel"}))
    (found,) = contract.changes()
    assert found.endswith("FusedMoEMethodBase wants novel")


@pytest.mark.parametrize("path", contract.CALLS)
def test_a_function_that_takes_other_arguments_is_named(
    path: str, replace: Callable[[str, object], None]
) -> None:
    def other(*, novel: object) -> None: ...

    replace(path, other)
    assert any(found.startswith(f"{path}: ") for found in contract.changes())


@pytest.mark.parametrize("path", contract.PARAMETERS)
def test_a_loader_that_models_call_otherwise_is_named(
    path: str, replace: Callable[[str, object], None]
) -> None:
    replace(path, changed)
    assert any(f"{path} takes self, novel and no longer" in found for found in contract.changes())


@pytest.mark.parametrize(("path", "name"), MEMBERS)
def test_a_member_that_is_gone_is_named(
    path: str, name: str, replace: Callable[[str, object], None]
) -> None:
    left = [member for member in contract.MEMBERS[path] if member != name]
    replace(path, SimpleNamespace(**dict.fromkeys(left)))
    assert f"{path} has lost {name}" in contract.changes()


@pytest.mark.parametrize(
    "path",
    # Whatever takes a class's place has a constructor.
    [*contract.PARAMETERS, *contract.MEMBERS, *(p for p in contract.CALLS if "__init__" not in p)],
)
def test_what_is_gone_altogether_is_named(
    path: str, monkeypatch: pytest.MonkeyPatch, replace: Callable[[str, object], None]
) -> None:
    module, _, names = path.partition(":")
    if names.count("."):
        replace(f"{module}:{names.split('.')[0]}", SimpleNamespace())
    else:
        monkeypatch.setattr(import_module(module), "__getattr__", _no_such_name, raising=False)
        monkeypatch.delattr(import_module(module), names, raising=False)
    assert any(found.startswith(f"{path}: ") for found in contract.changes())


def _no_such_name(name: str) -> object:
    raise AttributeError(f"no {name}")


@pytest.mark.parametrize("attribute", contract.LAYER_ATTRIBUTES)
def test_what_a_layer_lacks_is_named(attribute: str) -> None:
    _, layer = make_layer(random_experts(((1,), (2,))))
    delattr(layer, attribute)
    with pytest.raises(ServingError, match=f"layers.0.mlp: .* has lost {attribute}: pip install"):
        contract.require_attributes(layer, "layers.0.mlp")


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.32.0+cpu", "0.33.2rc1.dev5"])
def test_tested_versions_are_taken_at_their_word(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "changes", lambda: ["everything"])
    assert contract.too_old(version) is None
    contract.require(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.9.2", "0.1.dev7"])
def test_older_versions_are_refused_with_the_remedy(version: str) -> None:
    problem = contract.too_old(version)
    assert problem is not None
    assert f"this is vLLM {version}: pip install 'vllm>=0.26'" in problem


@pytest.mark.parametrize("version", [UNTESTED, "1.0.0", "dev"])
def test_a_newer_version_goes_on_with_a_warning_where_all_holds(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert contract.too_old(version) is None
    with caplog.at_level(logging.WARNING):
        contract.require(version)
    assert f"vLLM {version} is newer than" in caplog.text


def test_a_newer_version_is_refused_with_everything_that_changed(
    monkeypatch: pytest.MonkeyPatch, replace: Callable[[str, object], None]
) -> None:
    paths = list(contract.CALLS)[:2]
    for path in paths:
        replace(path, lambda *, novel: None)
    monkeypatch.setattr(vllm, "__version__", UNTESTED)
    with pytest.raises(ServingError) as caught:
        CameraConfig.from_config({"layers": {}})
    message = str(caught.value)
    assert f"this vLLM, {UNTESTED}, is not one that camera-serve knows" in message
    assert all(path in message for path in paths)
    assert message.endswith(
        f"pip install 'vllm>=0.26,<{contract.NEWEST[0]}.{contract.NEWEST[1] + 1}'"
    )


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (7, 0)])
def test_a_small_layer_gives_the_references_numbers(size: int, rank: int) -> None:
    try_layer(moe_config(size, rank))


def _doubled(layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, **rest: Any) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, 2 * topk_weights, **rest)


def _called_otherwise(layer: Any, **arguments: Any) -> torch.Tensor:
    return layer.quant_method.apply(layer, novel=None, **arguments)


@pytest.mark.parametrize(
    ("forward", "message"),
    [(_doubled, "output is off by"), (_called_otherwise, "fails with TypeError: .*'novel'")],
)
def test_a_newer_version_in_which_the_layer_means_something_else_is_refused(
    forward: Callable[..., torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoutedExperts, "forward_modular", forward)
    monkeypatch.setattr(vllm, "__version__", UNTESTED)
    config = camera_config()
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.moe_config = moe_config()
    with pytest.raises(ServingError, match=f"{UNTESTED}.*a small layer.*{message}"):
        config.get_quant_method(layer, "model.layers.0.mlp.experts")
    monkeypatch.setattr(vllm, "__version__", NEWEST)
    config.get_quant_method(layer, "model.layers.0.mlp.experts")
