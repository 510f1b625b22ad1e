"""A tiny FP8 original, and what `compress` makes of it with `keep_fp8` and without."""

from pathlib import Path
from typing import Any

from camera_serve import Calibration, Recipe, TierPlan, compress
from tests import tiny_models
from tests.originals import Published, fp8_whole, publish

PER_TENSOR = Published(
    fp8_whole("_scale", lambda rows: ()), {"quant_method": "fp8", "activation_scheme": "dynamic"}
)
"""One scale for each matrix, none for activations."""


def outputs(family: str, folder: Path, way: Published, **sizes: Any) -> tuple[Path, Path]:
    """The output with `keep_fp8`, and the one without."""
    dense = tiny_models.save(family, folder / "dense", **sizes)
    publish(dense, folder / "fp8", way)
    text = folder / "text.txt"
    text.write_text(Path(tiny_models.__file__).read_text())
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    for name, keep in (("kept", True), ("decoded", False)):
        plan = TierPlan.prune(0.4)
        recipe = Recipe.paper(plan=plan, calibration=calibration, align=4, keep_fp8=keep)
        compress(folder / "fp8", folder / name, recipe)
    return folder / "kept", folder / "decoded"
