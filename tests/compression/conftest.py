"""A calibration text that tests of whole compressions share."""

from pathlib import Path

import pytest

from tests import tiny_models


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(tiny_models.__file__).read_text())
    return path
