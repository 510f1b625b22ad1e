"""The Triton kernels compile for GPUs on any machine: the interpreter forgives too much.

With the Triton of vLLM 0.26, and with that of 0.33 in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from camera_serve.kernels.triton import moe, pack_layer
from camera_serve.kernels.triton.tiles import Tiles
from camera_serve.kernels.triton.tuned import TABLES
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier

D_MODEL, NUM_EXPERTS, ROWS = 2048, 8, 64
NEWEST = Path(sys.prefix) / "triton-newest"
IS_NEWEST = NEWEST in Path(triton.__file__).parents
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

INSTRUCTIONS = {
    "mma.sync": "mma.sync.aligned",
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
}
UNITS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
TENSOR_MEMORY = 512
"""Columns there are; a kernel that takes more compiles to nothing but a trap."""

FEW_BYTES = 128
"""Registers that do not fit lie in local memory: a thread may have a handful, not whole tiles."""

Compile = Callable[..., dict[str, CompiledKernel]]


class Card:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are cached by device: none of a real GPU's is mixed up with these.
        return -self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compile]:
    """Kernels by name of a call on a layer, which are compiled but not run."""
    found: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)

    def call(
        capability: int, bits: tuple[int, ...], dtype: torch.dtype, num_tokens: int, tiles: Tiles
    ) -> dict[str, CompiledKernel]:
        monkeypatch.setattr(driver, "_active", Card(capability))
        x, ids = torch.zeros(num_tokens, D_MODEL, dtype=dtype), torch.zeros(num_tokens, 2).int()
        moe.ragged_moe(x, ids.float(), ids, pack_layer(layer_of(bits, dtype), dtype), tiles)
        return found

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(moe, "_has_ptx", lambda x: True)
    yield call


def layer_of(bits: tuple[int, ...], dtype: torch.dtype) -> RaggedLayer:
    rows, tiers = NUM_EXPERTS * ROWS, []
    for b in bits:
        if b == 16:
            matrix = torch.zeros(rows, D_MODEL, dtype=dtype)
        else:
            words = torch.zeros(rows, D_MODEL * b // 32, dtype=torch.int32)
            grid = torch.ones(rows, D_MODEL // 128).half()
            matrix = PackedRows(b, words, grid, grid)
        offsets = tuple(range(0, rows + 1, ROWS))
        tiers.append(RaggedTier(matrix, matrix, matrix, offsets=offsets))
    return RaggedLayer(tuple(tiers))


def local_bytes(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes of a thread that lie in memory for want of registers."""
    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True
    )
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", usage.stdout))


@pytest.mark.parametrize(
    "capability, bits, dtype, bound, num_tokens",
    [
        (80, (16,), torch.bfloat16, 192, 16),
        (80, (3,), torch.bfloat16, 48, 16),
        (89, (16,), torch.bfloat16, 96, 16),
        (90, (16,), torch.bfloat16, 2, 1),
        (90, (16,), torch.bfloat16, 192, 16),
        (90, (3, 2, 1), torch.bfloat16, 2, 16),
        (90, (16, 8, 4), torch.float16, 96, 16),
        (100, (16,), torch.bfloat16, 192, 16),
        (100, (3, 2, 1), torch.bfloat16, 48, 16),
        (120, (2,), torch.bfloat16, 48, 16),
    ],
    ids=str,
)
def test_kernels_use_a_gpu_s_units(
    compiled: Compile,
    tmp_path: Path,
    capability: int,
    bits: tuple[int, ...],
    dtype: torch.dtype,
    bound: int,
    num_tokens: int,
) -> None:
    unit = UNITS[capability]
    row = TABLES[unit]["dense" if bits == (16,) else "packed"][bound]
    kernels = compiled(capability, bits, dtype, num_tokens, Tiles(**row))
    assert ("_route" in kernels) == (num_tokens > 1) and "add_up" in kernels
    for name in ("gate_up", "down"):
        ptx = kernels[name].asm["ptx"]
        assert INSTRUCTIONS[unit] in ptx and "trap;" not in ptx
        assert (kernels[name].metadata.tmem_size or 0) <= TENSOR_MEMORY
        assert local_bytes(kernels[name], tmp_path) <= FEW_BYTES
        # What travels asynchronously, does so 16 bytes at a time.
        assert "cp.async.cg.shared.global [" in ptx and ", 0x10," in ptx
    # Weights do: the tiles that are on their way beside the one in use have room.
    columns = row["step"] * 2 if bits == (16,) else 512 * max(set(bits) - {16}) // 8
    weights = 2 * row["rows"] * columns
    assert kernels["gate_up"].metadata.shared >= (row["stages"] - 1) * weights


@pytest.mark.skipif(IS_NEWEST, reason="this is the process of its own")
def test_the_newest_triton_that_vllm_uses_compiles_them_too() -> None:
    assert NEWEST.exists(), f"{NEWEST} is missing; run make setup"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PYTHONPATH": str(NEWEST)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10, done.stdout[-2000:]
