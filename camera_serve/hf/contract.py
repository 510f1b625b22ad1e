"""What ours takes for granted about transformers' quantizers, checked before it loads a model."""

import inspect
from collections.abc import Callable
from typing import Any

from camera_serve.errors import LibraryError

ASKED_WITH_THE_CONFIG = {"update_tp_plan", "update_attn_implementation"}
"""Which of them transformers calls depends on its version: one is enough."""


def check_overrides(ours: type, base: type) -> None:
    """Raise `LibraryError` unless `base` has each method of `ours`, and its arguments fit."""
    methods = {name: value for name, value in vars(ours).items() if not name.startswith("__")}
    absent = {name for name in methods if not hasattr(base, name)}
    if absent >= ASKED_WITH_THE_CONFIG or absent - ASKED_WITH_THE_CONFIG:
        names = ", ".join(sorted(absent))
        raise LibraryError.of_transformers(f"its {base.__name__} has no {names}")
    for name in methods.keys() - absent:
        theirs = getattr(base, name)
        if inspect.isfunction(theirs) and not _fits(methods[name], theirs):
            arguments = inspect.signature(theirs)
            raise LibraryError.of_transformers(f"its {base.__name__} calls {name}{arguments}")


def _fits(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Whether a call with all arguments that `theirs` names is one `ours` takes."""
    parameters = inspect.signature(theirs).parameters.values()
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    try:
        inspect.signature(ours).bind(*by_place, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True
