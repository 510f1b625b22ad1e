"""Settings of the experts that contradict each other, or what transformers makes of them.

transformers keeps settings that it does not know, and takes one of two that it knows as the same.
"""

from collections.abc import Mapping
from typing import Any

from camera_serve.errors import UnsupportedModelError
from camera_serve.models.families import FAMILIES, Config, whole
from camera_serve.models.structure import COUNTS, MoeStructure

LIMITS = (
    *("swiglu_limit", "swiglu_limits", "swiglu_limits_shared", "swiglu_alpha", "swiglu_beta"),
    *("moe_swiglu_limit", "activation_limit"),
)
"""What families with clamped experts call where they clamp, and how; 0 and null are nowhere."""

SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""What families call the number of shared experts."""


def check_contradictions(raw: Mapping[str, Any], config: Config, structure: MoeStructure) -> None:
    """Refuse a config.json that describes other experts than transformers makes of it.

    raw: the file; config: what transformers read. Raises `UnsupportedModelError` with the setting.
    """
    text = raw.get("text_config")
    if isinstance(text, dict):
        _check_type(text, config.get_text_config())
    _check_groups(config.get_text_config(), structure)
    for part in (raw, text if isinstance(text, dict) else {}):
        _check_limits(part, structure)
        _check_counts(part)
        _check_shared(part, structure)


def _check_type(text: Mapping[str, Any], config: Config) -> None:
    found, wanted = text.get("model_type"), type(config).model_type
    known = [wanted, *(name for name, family in FAMILIES.items() if family.known_as == wanted)]
    if found is not None and found not in known:
        raise UnsupportedModelError(
            f"text_config.model_type is {found!r:.100}: wanted {' or '.join(known)}"
        )


def _check_limits(part: Mapping[str, Any], structure: MoeStructure) -> None:
    for key in LIMITS:
        value = part.get(key)
        if any(value) if isinstance(value, list) else value:
            raise UnsupportedModelError(
                f"{structure.model_type} with {key} = {value!r:.100} is not understood: its "
                "experts would clamp what they compute, and in transformers they do not"
            )


def _check_counts(part: Mapping[str, Any]) -> None:
    found = {key: part[key] for key in COUNTS if part.get(key)}
    if len(set(map(repr, found.values()))) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UnsupportedModelError(
            f"{one} is {first!r:.100} and {other} is {second!r:.100}: two numbers of experts; "
            "download config.json again"
        )


def _check_shared(part: Mapping[str, Any], structure: MoeStructure) -> None:
    for key in SHARED_COUNTS:
        if part.get(key) and not structure.shared_d_ff:
            raise UnsupportedModelError(
                f"{structure.model_type} with {key} = {part[key]!r:.100} is not understood: in "
                "transformers this model has no shared experts"
            )


def _check_groups(text: Config, structure: MoeStructure) -> None:
    groups = getattr(text, "n_group", None)
    if not isinstance(groups, int) or groups <= 1:
        return
    if structure.num_experts % groups:
        raise UnsupportedModelError(
            f"n_group is {groups}: {structure.num_experts} experts do not make {groups} groups of "
            "one size"
        )
    taken = whole(text, "topk_group", most=groups)
    within = taken * structure.num_experts // groups
    if within < structure.top_k:
        raise UnsupportedModelError(
            f"topk_group is {taken}: so many groups of {groups} hold {within} experts, and a token "
            f"takes {structure.top_k}"
        )
