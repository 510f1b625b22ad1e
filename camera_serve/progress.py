"""What a long run reports while it works: step, share done, time left, peak memory."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Unit = Literal["layers", "bytes"]
"""What a step counts: decoder layers, or bytes read."""


@dataclass(frozen=True)
class Progress:
    """One report: `done` of `total` layers or bytes; times in seconds, memory in bytes."""

    step: str
    done: int
    total: int
    elapsed: float
    eta: float | None
    peak_bytes: int
    unit: Unit = "layers"


PROC_STATUS = Path("/proc/self/status")

OnProgress = Callable[[Progress], None]

OnNote = Callable[[str], None]
"""Told one line that a person should know, and that is no error."""


class Reporter:
    """Turns what is done into `Progress` with a time left, from the work of this run only."""

    def __init__(
        self,
        total: int,
        device: torch.device,
        on_progress: OnProgress | None,
        unit: Unit = "layers",
    ) -> None:
        self.total = total
        self.unit = unit
        self.device = device
        self.on_progress = on_progress
        self.start = time.monotonic()
        self.first: int | None = None
        self.done = 0

    def __call__(self, step: str, done: int) -> None:
        """Report that `done` of the total is finished, some of it perhaps by an earlier run."""
        self.done = done
        if self.first is None:
            self.first = done
        elapsed = time.monotonic() - self.start
        finished = done - self.first
        eta = elapsed / finished * (self.total - done) if finished else None
        if self.on_progress:
            peak = peak_memory(self.device)
            self.on_progress(Progress(step, done, self.total, elapsed, eta, peak, self.unit))

    def advance(self, step: str, amount: int) -> None:
        """Report `amount` more than before."""
        self(step, self.done + amount)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: the device's own on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROC_STATUS.exists():
        # ru_maxrss would count the memory of whoever started this process, before exec.
        fields = dict(line.split(":", 1) for line in PROC_STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
