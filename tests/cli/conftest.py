"""A tiny model, a calibration text, and a runner that fails on any traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from camera_serve.cli import main
from tests import tiny_models

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("models") / "qwen2_moe")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(Path(tiny_models.__file__).read_text())
    return file


@pytest.fixture
def small(calibration: Path) -> list[str]:
    """Calibration flags that keep a run of the tiny model under a second."""
    return ["--calibration", str(calibration), "--samples", "4", "--seq-len", "64"]


@pytest.fixture
def run() -> Run:
    """Call `camera-serve`; anything but an exit by the error handler fails the test."""

    def invoke(*args: object) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.output
        return result

    return invoke
