"""Where a run computes, in which dtype, and where its log goes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from camera_serve.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises `RecipeError` when there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name} is unknown: use auto, cpu or cuda")
    return torch.device(name)


def compute_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    """The dtype activations are computed in: `auto` is the one the weights are stored in."""
    return stored if name == "auto" else getattr(torch, name)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append what camera-serve logs to a file while the body runs."""
    logger = logging.getLogger("camera_serve")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
