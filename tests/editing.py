"""Edits of a checkpoint on disk that a test makes on purpose."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"

Tensors = dict[str, torch.Tensor]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite config.json after `change` has edited it in place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite a one-file checkpoint after `change` has edited its tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def digest(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the hash of its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
