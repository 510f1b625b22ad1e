"""What loads models passes with the oldest and the newest transformers, in processes of their own.

Both lie beside that of vLLM, which the other tests use.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

from camera_serve.errors import TRANSFORMERS_TESTED

ROOT = Path(__file__).parents[2]
AGES = dict(zip(("oldest", "newest"), TRANSFORMERS_TESTED, strict=True))
FOLDERS = {age: Path(sys.prefix) / f"transformers-{age}" for age in AGES}
IS_ITS_OWN = any(folder in Path(transformers.__file__).parents for folder in FOLDERS.values())
TESTS = (
    "tests/hf",
    "tests/models",
    "tests/calibration/test_streaming.py",
    # What these decode are no models.
    "--ignore=tests/models/formats",
    # What vLLM reads beside the transformers that it comes with.
    "--ignore=tests/models/test_settings_read.py",
)
RUN = "import sys, pytest, transformers; print(transformers.__version__); sys.exit(pytest.main())"


@pytest.mark.parametrize("age", AGES)
@pytest.mark.skipif(IS_ITS_OWN, reason="this is the process of its own")
def test_models_load_and_run_with_it_too(age: str) -> None:
    assert FOLDERS[age].exists(), f"{FOLDERS[age]} is missing; run make setup"
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": str(FOLDERS[age])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == AGES[age]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 150, done.stdout[-2000:]


def test_the_oldest_is_the_oldest_that_pip_may_install() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        f"transformers>={AGES['oldest'].removesuffix('.0')}" in settings["project"]["dependencies"]
    )


@pytest.mark.parametrize("age", AGES)
def test_the_versions_in_messages_are_those_of_the_tests(age: str) -> None:
    pins = (ROOT / ".ci" / f"transformers-{age}-requirements.txt").read_text().splitlines()
    assert f"transformers=={AGES[age]}" in pins
