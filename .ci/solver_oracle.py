"""Fetch AutoGPTQ's solver, which ours is tested against, into the environment's `oracle` folder.

The package itself is archived and no longer imports with current transformers, so only the two
files of its solver are unpacked; the tests load them alone.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "auto-gptq==0.7.1"
FILES = ("auto_gptq/quantization/gptq.py", "auto_gptq/quantization/quantizer.py")


def main() -> None:
    """Download the wheel of any platform, for its Python files alone."""
    target = Path(sys.prefix) / "oracle"
    if all((target / name).exists() for name in FILES):
        return
    with TemporaryDirectory() as folder:
        choice = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
        platforms = ["--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_17_x86_64"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "-d", folder]
        subprocess.run([*pip, *choice, *platforms, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                archive.extract(name, target)


if __name__ == "__main__":
    main()
