"""Weights outside the experts that an output keeps in FP8, byte for byte as the original has them.

They are linear layers of decoder layers; draft layers, which are served as they are, become 16 bits
like everything else. Read, they are decoded as the original's are.
"""

from collections.abc import Mapping

import torch

from camera_serve.checkpoint.entries import TensorEntry
from camera_serve.checkpoint.format import OutsideExperts, Shapes
from camera_serve.checkpoint.originals import module_of
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError, RecipeError
from camera_serve.models.formats import Fp8


def kept_in_fp8(original: Checkpoint) -> OutsideExperts:
    """The modules of an original that stay in FP8.

    Raises `RecipeError` for one that is not published in FP8 as vLLM's method `fp8` serves it.
    """
    storage = original.storage
    if storage is None or storage.method != "fp8":
        found = f"is published as {storage.title}" if storage else "holds 16-bit weights"
        raise _refused(original, found)
    if original.structure.model_type == "deepseek":
        # Prefixes are empty there, so that no layer knows that it is one of these.
        raise _refused(original, "is served by a model of vLLM's that names no attention layer")
    if not storage.dynamic:
        raise _refused(original, "has static scales of activations, which are not carried over")
    kept = {
        name: entry for name, entry in original.entries.items() if _stays(original, name, entry)
    }
    if not kept:
        raise _refused(original, "has no weight outside the experts in FP8")
    formats = {entry.coding.format for entry in kept.values() if entry.coding}
    block = next(f.block for f in formats if isinstance(f, Fp8))
    for name, entry in kept.items():
        if block is None and _numbers(_scales(entry)) > 1:
            raise _refused(original, f"has a scale per row of {name}, which vLLM's fp8 has not")
    return OutsideExperts(
        weight_block_size=block, modules=tuple(sorted(module_of(name) for name in kept))
    )


def stored_parts(
    checkpoint: Checkpoint, name: str, outside: OutsideExperts
) -> dict[str, torch.Tensor]:
    """The tensors of a kept weight, codes and scales as they are stored, by the output's names.

    A scale for the whole matrix is `[1]`, as vLLM has it, whatever its shape in the original.
    """
    coding = checkpoint.entries[name].coding
    assert coding
    codes, scales = (checkpoint.read(part) for part in (coding.parts[""], _scales_of(coding.parts)))
    scales = scales if outside.weight_block_size else scales.reshape(1)
    return {name: codes, f"{name}{outside.scale}": scales}


def weights_of(outside: OutsideExperts | None) -> frozenset[str]:
    """The names of all kept weights."""
    return frozenset(f"{module}.weight" for module in outside.modules) if outside else frozenset()


def scale_shapes(outside: OutsideExperts, weights: Shapes) -> Shapes:
    """The tensors of scales beside the kept weights, from the weights' shapes.

    Raises `CheckpointError` for a module that the model does not have.
    """
    format_, shapes = Fp8(outside.scale, outside.weight_block_size), {}
    for name in sorted(weights_of(outside)):
        if name not in weights:
            raise CheckpointError(f"outside_experts lists {module_of(name)}, which has no weight")
        grid = format_.part_shapes(weights[name])[outside.scale][0]
        shapes[f"{name}{outside.scale}"] = grid if outside.weight_block_size else (1,)
    return shapes


def saved_bytes(original: Checkpoint, outside: OutsideExperts | None) -> int:
    """How many bytes fewer the kept weights take than in 16 bits."""
    kept = (original.entries[name] for name in weights_of(outside))
    return sum(entry.num_bytes - entry.stored_bytes for entry in kept)


def _stays(original: Checkpoint, name: str, entry: TensorEntry) -> bool:
    structure = original.structure
    layers = tuple(f"{structure.layer_prefix(layer)}." for layer in range(structure.num_layers))
    # vLLM's routers, and gates of shared experts, are in 16 bits in every family.
    blocks = tuple(f"{structure.moe_prefix(layer)}." for layer in structure.moe_layers)
    inside = name.startswith(layers) and not name.startswith(blocks)
    return inside and entry.coding is not None and len(entry.shape) == 2


def _scales(entry: TensorEntry) -> TensorEntry:
    assert entry.coding
    return _scales_of(entry.coding.parts)


def _scales_of(parts: Mapping[str, TensorEntry]) -> TensorEntry:
    return next(part for suffix, part in parts.items() if suffix)


def _numbers(entry: TensorEntry) -> int:
    return torch.Size(entry.shape).numel()


def _refused(original: Checkpoint, why: str) -> RecipeError:
    return RecipeError(
        f"--keep-fp8: {original.path} {why}: start without --keep-fp8, which writes everything "
        "outside the experts in 16 bits"
    )
