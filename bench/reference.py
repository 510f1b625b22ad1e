"""Where the bundled reference MoE and its texts lie."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench" / "reference_moe"
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "calibration.txt"
HELDOUT = {
    "code, in domain": FOLDER / "heldout_code.txt",
    "prose, out of domain": FOLDER / "heldout_prose.txt",
}
