"""Memory of a server: of its processes, as the kernel counts it, and of the model on a GPU."""

import re
from collections.abc import Iterator
from pathlib import Path

_GIB = re.compile(r"Model loading took ([0-9.]+) GiB")


def peak_resident_bytes(session: int, proc: Path = Path("/proc")) -> int | None:
    """Peak resident bytes (VmHWM) of all processes of a session, summed; None where unknown.

    Pages that processes share count once for each. The peak includes loading.
    """
    peaks = [_field(status, "VmHWM") for status in _session(session, proc)]
    return sum(peaks) if peaks else None


def resident_bytes(session: int, proc: Path = Path("/proc")) -> int | None:
    """Resident bytes (VmRSS) of all processes of a session now, summed; None where unknown."""
    sizes = [_field(status, "VmRSS") for status in _session(session, proc)]
    return sum(sizes) if sizes else None


def model_bytes(log: str) -> int | None:
    """What vLLM's log says the model takes on one device; None when it says nothing (CPU)."""
    found = _GIB.search(log)
    return round(float(found[1]) * 2**30) if found else None


def _session(session: int, proc: Path) -> Iterator[str]:
    """`/proc/PID/status` of every process of a session."""
    for folder in proc.glob("[0-9]*"):
        try:
            stat, status = (folder / "stat").read_text(), (folder / "status").read_text()
        except OSError:
            # It ended meanwhile.
            continue
        # The name, in brackets, may hold anything; the session is the fourth field after it.
        if int(stat.rpartition(")")[2].split()[3]) == session:
            yield status


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
