"""Output tokens per second over concurrency, as a picture. Needs the `plots` extra."""

import statistics
from pathlib import Path
from typing import Any

from camera_serve.benchmark.report import BenchReport
from camera_serve.errors import OutputError

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None


def require_plots() -> None:
    """Raise `OutputError` when matplotlib is not installed."""
    if Figure is None:
        raise OutputError("a picture needs matplotlib: pip install 'camera-serve[plots]'")


def draw(report: BenchReport, path: Path) -> None:
    """Write the picture: a line per model through its medians, bars from least to most."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for model in report.models:
        _draw_model(axes, report, model.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(report.settings.concurrencies, map(str, report.settings.concurrencies))
    axes.set_xlabel("requests at once")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _draw_model(axes: Any, report: BenchReport, model: str) -> None:
    loads = [load for load in report.settings.loads if load.concurrency]
    speeds = [[r.output_tokens_per_second for r in report.runs(model, load)] for load in loads]
    middle = [statistics.median(found) for found in speeds]
    below = [m - min(found) for m, found in zip(middle, speeds, strict=True)]
    above = [max(found) - m for m, found in zip(middle, speeds, strict=True)]
    at_once = [load.concurrency for load in loads]
    axes.errorbar(at_once, middle, yerr=(below, above), marker="o", capsize=3, label=model)
