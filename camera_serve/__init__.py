"""camera-serve: compress MoE language models with CAMERA and serve them in vLLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camera_serve.checkpoint.report import CompressionReport
    from camera_serve.compression.analysis import AnalysisReport, AnalysisSettings, analyze
    from camera_serve.compression.pipeline import compress, estimate
    from camera_serve.compression.sizing import Estimate
    from camera_serve.progress import Progress
    from camera_serve.recipe import Calibration, Recipe, TierPlan

__all__ = [
    "AnalysisReport",
    "AnalysisSettings",
    "Calibration",
    "CompressionReport",
    "Estimate",
    "Progress",
    "Recipe",
    "TierPlan",
    "analyze",
    "compress",
    "estimate",
]

_HOMES = {
    "AnalysisReport": "compression.analysis",
    "AnalysisSettings": "compression.analysis",
    "Calibration": "recipe",
    "CompressionReport": "checkpoint.report",
    "Estimate": "compression.sizing",
    "Progress": "progress",
    "Recipe": "recipe",
    "TierPlan": "recipe",
    "analyze": "compression.analysis",
    "compress": "compression.pipeline",
    "estimate": "compression.pipeline",
}


def __getattr__(name: str) -> Any:
    # Lazy, because vLLM imports this package in every process before it knows the model.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
