"""What decides the bytes of a compressed checkpoint, each part hashed under its own name."""

import hashlib
import json
from importlib.metadata import version

import torch

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.recipe import Recipe


def fingerprint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Identify a run by its inputs, so that it resumes only its own work.

    Weights are identified by name, shape, dtype, file size and modification time: hashing
    hundreds of gigabytes would take longer than the analysis.
    """
    recipe_parts = {
        f"recipe.{key}": json.dumps(value) for key, value in recipe.model_dump(mode="json").items()
    }
    return {
        "model config": _hash(json.dumps(checkpoint.raw_config, sort_keys=True)),
        "model weights": _hash(_describe_weights(checkpoint)),
        **recipe_parts,
        "calibration tokens": _hash(json.dumps(tokens.tolist())),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "camera-serve": version("camera-serve"),
    }


def _describe_weights(checkpoint: Checkpoint) -> str:
    files = {entry.file for entry in checkpoint.entries.values()}
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    tensors = sorted(
        (name, entry.file.name, entry.shape, entry.dtype)
        for name, entry in checkpoint.entries.items()
    )
    return json.dumps([stats, tensors])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
