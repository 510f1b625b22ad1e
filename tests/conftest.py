"""What every test shares: offline, one thread, and fresh memory that is poison."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch

# A file is run by one worker of pytest-xdist: the long ones come first, so that all end together.
LONG_FIRST = (
    "e2e/",
    "compression/test_pipeline.py",
    "kernels/test_triton.py",
    "vllm_plugin/test_triton_moe.py",
    "kernels/test_cpu_bounds.py",
)


def _turn(item: pytest.Item) -> int:
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    turns = [turn for turn, start in enumerate(LONG_FIRST) if path.startswith(start)]
    return min(turns, default=len(LONG_FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    # Tests run beside a server's own threads, and sums keep one order.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (integers: the largest value), never lucky zeros."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
