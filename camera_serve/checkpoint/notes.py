"""What a person should know of an original before it is compressed, and that is no error."""

import importlib.util
from collections.abc import Iterator

from camera_serve.checkpoint.reader import Checkpoint, stored_quantization

KNOWN_BESIDE = ("mtp.", "visual.", "vision_tower.")
"""What names of parts begin with that are published beside a text model: a draft, an encoder."""


def notes(original: Checkpoint) -> Iterator[str]:
    """One line for each: tensors of nobody's, what else was quantized, what serving needs."""
    if foreign := sorted(name for name in original.carried_names if _is_foreign(original, name)):
        yield (
            f"{foreign[0]} is no part of a {original.structure.model_type} model ({len(foreign)} "
            f"{'tensor' if len(foreign) == 1 else 'tensors'} of that kind): copied as they are"
        )
    if lost := _quantized_beside_weights(original):
        yield f"{' and '.join(lost)} of the original are quantized; the output's are in 16 bits"
    if "vision_config" in original.raw_config and not importlib.util.find_spec("torchvision"):
        yield (
            "to serve this model, which sees pictures, vLLM needs torchvision, and it is not "
            "installed here: pip install torchvision, from the index that torch is from"
        )


def _quantized_beside_weights(original: Checkpoint) -> list[str]:
    """What `quantization_config` says of an original beyond its weights, in words."""
    if original.storage is None:
        return []
    stored = stored_quantization(original.raw_config, original.path)
    data = stored.get("quantization", stored)
    groups = data.get("config_groups")
    parts = groups.values() if isinstance(groups, dict) else ()
    activations = any(isinstance(part, dict) and part.get("input_activations") for part in parts)
    cache = data.get("kv_cache_scheme") or data.get("kv_cache_quant_algo")
    return ["activations"] * activations + ["keys and values in the cache"] * bool(cache)


def _is_foreign(original: Checkpoint, name: str) -> bool:
    """Whether a tensor that config.json does not ask for is of no part that models come with."""
    structure = original.structure
    # What lies in the stack of layers has been looked at when the checkpoint was opened.
    stack = structure.layer_prefix(0).removesuffix("layers.0")
    parts = (stack, "lm_head.", *structure.family.elsewhere, *KNOWN_BESIDE)
    return not (name.startswith(parts) or structure.is_draft(name))
