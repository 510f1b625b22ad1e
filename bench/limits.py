"""What the machine can do at most: the two figures every kernel's speed is read against."""

import ctypes
import mmap
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from camera_serve.errors import KernelBuildError
from camera_serve.kernels.cpu.build import FLAGS, find_compiler
from camera_serve.recipe import Settings

SOURCE = Path(__file__).parent / "limits.cpp"
READ_BYTES = 2**29
STREAMS = (1, 4, 8, 16)
REPEATS = 25
ROUNDS = 2**22


class Limits(Settings):
    """The best of several tries with a number of threads.

    `read_bytes_per_second`: a loop that sums a buffer of 512 MiB, larger than the caches.
    `bf16_flop_per_second`: `vdpbf16ps` on registers; None without that instruction.
    """

    threads: int
    read_bytes_per_second: float
    bf16_flop_per_second: float | None

    def __str__(self) -> str:
        """As a table's title has it."""
        read = f"reads {self.read_bytes_per_second / 1e9:.0f} GB/s"
        if self.bf16_flop_per_second is None:
            return read
        return f"{read}, {self.bf16_flop_per_second / 1e9:.0f} GFLOP/s of bf16"


def measure(threads: int) -> Limits:
    """Both limits with `threads` threads, in a few seconds."""
    library, words = _library(), _words(READ_BYTES // 8)
    reads = [_seconds(partial(read_words, words, streams, threads)) for streams in STREAMS]
    flop = int(library.multiply_add(1, threads)) * ROUNDS
    seconds = _seconds(partial(library.multiply_add, ROUNDS, threads))
    return Limits(
        threads=threads,
        read_bytes_per_second=READ_BYTES / min(reads),
        bf16_flop_per_second=flop / seconds if flop else None,
    )


def read_words(words: torch.Tensor, streams: int, threads: int) -> int:
    """The sum modulo 2^64 of int64 words, which takes reading each of them."""
    return int(_library().read_words(words.data_ptr(), words.numel(), streams, threads))


def _words(count: int) -> torch.Tensor:
    """Words in huge pages where the system has them, as the kernel keeps its weights."""
    memory = mmap.mmap(-1, 8 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Filled, because untouched memory is one page of zeros over and over.
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


def _seconds(run: Callable[[], int]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="camera-limits-") as folder:
        target = Path(folder) / "limits.so"
        # Used once and here: unlike the kernel, it may be built for this very machine.
        flags = (*FLAGS, "-march=native", "-shared")
        command = [*find_compiler(), *flags, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KernelBuildError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        library = ctypes.CDLL(str(target))
    size = ctypes.c_int64
    library.read_words.argtypes = (ctypes.c_void_p, size, size, size)
    library.read_words.restype = ctypes.c_uint64
    library.multiply_add.argtypes, library.multiply_add.restype = (size, size), size
    return library
