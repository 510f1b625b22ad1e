"""What the machine can do: the two figures every kernel's speed is read against."""

import ctypes
import mmap
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path

import torch

from camera_serve.errors import KernelBuildError
from camera_serve.kernels.cpu.build import FLAGS, find_compiler
from camera_serve.recipe import Settings

SOURCE = Path(__file__).parent / "limits.cpp"
READ_BYTES = 2**29
PART_BYTES = 2**26
STREAMS = (1, 4, 8, 16)
TRIES = 4
ROUNDS = 2**18


class Limits(Settings):
    """What the machine reached with some threads: medians over time of the best of a few tries.

    `read_bytes_per_second`: a loop that sums parts of a buffer larger than the caches.
    `bf16_flop_per_second`: `vdpbf16ps` on registers; None without that instruction.
    """

    threads: int
    read_bytes_per_second: float
    bf16_flop_per_second: float | None

    @classmethod
    def middle(cls, found: Iterable["Limits"]) -> "Limits":
        """The medians of several, all with the same number of threads."""
        every = list(found)
        flop = [limits.bf16_flop_per_second for limits in every]
        return cls(
            threads=every[0].threads,
            read_bytes_per_second=statistics.median(one.read_bytes_per_second for one in every),
            bf16_flop_per_second=statistics.median(f for f in flop if f) if all(flop) else None,
        )

    def __str__(self) -> str:
        """As a table's title has it."""
        read = f"reads {self.read_bytes_per_second / 1e9:.0f} GB/s"
        if self.bf16_flop_per_second is None:
            return read
        return f"{read}, {self.bf16_flop_per_second / 1e9:.0f} GFLOP/s of bf16"


class Ruler:
    """The limits, measured a little at a time between other things.

    Other guests of a machine take their part of its memory, now more, now less: a limit of another
    minute is none.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # Far more than the caches hold, and read in a circle.
        self._words = cycle(_words(READ_BYTES // 8).split(PART_BYTES // 8))
        self._seconds: list[tuple[float, float]] = []
        self._streams = min(STREAMS, key=self._fastest)

    def measure(self) -> None:
        """Read a few parts, the next ones each time, and multiply for a moment."""
        read = self._fastest(self._streams)
        multiplied = (seconds(partial(multiply_add, ROUNDS, self._threads)) for _ in range(TRIES))
        self._seconds.append((read, min(multiplied)))

    def limits(self) -> Limits:
        """What was measured so far."""
        read, multiplied = (statistics.median(s) for s in zip(*self._seconds, strict=True))
        flop = multiply_add(1, self._threads) * ROUNDS
        return Limits(
            threads=self._threads,
            read_bytes_per_second=PART_BYTES / read,
            bf16_flop_per_second=flop / multiplied if flop else None,
        )

    def _fastest(self, streams: int) -> float:
        parts = islice(self._words, TRIES)
        return min(seconds(partial(read_words, part, streams, self._threads)) for part in parts)


def seconds(run: Callable[[], int]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def multiply_add(rounds: int, threads: int) -> int:
    """Multiply bf16 pairs in registers; the operations done, 0 without such an instruction."""
    return int(_library().multiply_add(rounds, threads))


def read_words(words: torch.Tensor, streams: int, threads: int) -> int:
    """The sum modulo 2^64 of int64 words, which takes reading each of them."""
    return int(_library().read_words(words.data_ptr(), words.numel(), streams, threads))


@cache
def _words(count: int) -> torch.Tensor:
    """Words in huge pages where the system has them, as the kernel keeps its weights."""
    memory = mmap.mmap(-1, 8 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Filled, because untouched memory is one page of zeros over and over.
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


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
