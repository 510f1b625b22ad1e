"""Whether another library calls, and can be called, as ours takes for granted."""

import inspect
from collections.abc import Callable
from typing import Any


def fits(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Whether a call with all arguments that `theirs` names is one `ours` takes."""
    parameters = inspect.signature(theirs).parameters.values()
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    try:
        inspect.signature(ours).bind(*by_place, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True
