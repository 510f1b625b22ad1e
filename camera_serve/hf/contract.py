"""What ours takes for granted about transformers' quantizers, checked before it loads a model."""

import inspect

from camera_serve.errors import LibraryError
from camera_serve.signatures import fits

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
        if inspect.isfunction(theirs) and not fits(methods[name], theirs):
            arguments = inspect.signature(theirs)
            raise LibraryError.of_transformers(f"its {base.__name__} calls {name}{arguments}")
