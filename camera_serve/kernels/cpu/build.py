"""Compiles the C++ kernel at first use and keeps it: one library per source and compiler."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from camera_serve.errors import KernelBuildError

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
# Only the files that ask the processor first may use what not every processor has. -O2: unrolled
# tiles that -O3 would reshape.
AVX512_FLAGS = (
    *("-O2", "-mtune=znver3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512bf16", "-mavx512vnni", "-mfma"),
)
X86_FLAGS = {
    "isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "isa_avx512.cpp": AVX512_FLAGS,
    "int8_avx512.cpp": AVX512_FLAGS,
}
ERROR_LINES = 20


@cache
def shared_library() -> Path:
    """The compiled kernel; compiles it when this source has not met this compiler before.

    It lies in `$CAMERA_SERVE_CACHE`, or else in `camera-serve` in the user's cache folder. Raises
    `KernelBuildError` when there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = find_compiler()
    name = f"camera-moe-{_fingerprint(compiler)}.so"
    library = cache_folder() / name
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
                built = compile_library(compiler, Path(folder))
                # Several processes may build at once: whoever renames last wins, with equal bytes.
                built.rename(library)
        except OSError as error:
            raise KernelBuildError(
                f"the CPU kernel cannot be stored in {library.parent}: {error}; name a folder that "
                "can be written in CAMERA_SERVE_CACHE"
            ) from error
    return library


def cache_folder() -> Path:
    """Where compiled kernels are kept; raises `KernelBuildError` for a user without a home."""
    if chosen := os.environ.get("CAMERA_SERVE_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camera-serve"
    except RuntimeError as error:
        raise KernelBuildError(
            f"{error}: name a folder for the compiled CPU kernel in CAMERA_SERVE_CACHE"
        ) from error


def find_compiler() -> list[str]:
    """The C++ compiler's command: `$CXX`, or the first of the usual names on the path."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        command = shlex.split(name)
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise KernelBuildError(
        f"no C++ compiler found (looked for {', '.join(names)}): the CPU kernel is compiled at "
        "first use; install g++ or clang++, or name one in CXX"
    )


def compile_library(compiler: list[str], folder: Path) -> Path:
    """Compile all sources into `folder`; returns the shared library there."""
    objects = {source: folder / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
    commands = [
        [*compiler, *flags_of(source), "-c", str(source), "-o", str(target)]
        for source, target in objects.items()
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = folder / "camera-moe.so"
    _run([*compiler, "-shared", "-fopenmp", *map(str, objects.values()), "-o", str(library)])
    return library


def flags_of(source: Path) -> tuple[str, ...]:
    """The compiler's flags for one source file on this machine."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (*FLAGS, *(X86_FLAGS.get(source.name, ()) if is_x86 else ()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[:ERROR_LINES])
        raise KernelBuildError(
            f"{shlex.join(command)} failed with code {done.returncode}: the CPU kernel needs a "
            f"C++17 compiler with OpenMP (on x86, GCC 10 or clang 9 and newer):\n{lines}"
        )


def _fingerprint(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    for part in (shlex.join(compiler).encode(), version, platform.machine().encode()):
        digest.update(part)
    digest.update(repr((FLAGS, X86_FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]
