"""The CPU kernel never leaves its buffers and refuses every malformed layer, under sanitizers.

`cpu_bounds.cpp` says how; here it is compiled with the kernel's own flags and run.
"""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from camera_serve.errors import KernelBuildError
from camera_serve.kernels.cpu.build import SOURCES, find_compiler, flags_of

# After the kernel's own flags, so that this -O is the one in force: it compiles in a third of the
# time of -O1 and drops no access.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0")
PROGRAM = Path(__file__).with_name("cpu_bounds.cpp")
ENVIRONMENT = {
    **os.environ,
    # The OpenMP runtime keeps its threads' memory, and looking for leaks needs ptrace.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
CASES = 300


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program; skips where the compiler cannot sanitize."""
    folder = tmp_path_factory.mktemp("bounds")
    try:
        compiler = find_compiler()
    except KernelBuildError as error:
        pytest.skip(str(error))
    skip_without_sanitizers(compiler, folder)
    sources = [*sorted(SOURCES.glob("*.cpp")), PROGRAM]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, *flags_of(source), *SANITIZE, f"-I{SOURCES}", "-c", source, "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_, commands))
    compile_([*compiler, "-fopenmp", *SANITIZE, *objects, "-o", folder / "bounds"])
    return folder / "bounds"


def skip_without_sanitizers(compiler: list[str], folder: Path) -> None:
    source, target = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    command = [*compiler, *SANITIZE, source, "-o", target]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode or subprocess.run([target], env=ENVIRONMENT).returncode:
        pytest.skip(f"{compiler[0]} has no working libasan and libubsan: {built.stderr[:200]}")


def compile_(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def run(program: Path, *arguments: str) -> None:
    """Run it; it prints the instruction sets it tried."""
    command = [program, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments}: code {done.returncode}\n{done.stderr[:4000]}"
    assert "portable" in done.stdout.split()


def test_malformed_layers_are_refused_and_nothing_is_touched(program: Path) -> None:
    run(program, "refuse")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_no_byte_outside_a_buffer_is_touched(program: Path, seed: str) -> None:
    run(program, "fuzz", seed, str(CASES))
