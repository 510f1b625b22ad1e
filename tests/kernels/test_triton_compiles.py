"""The Triton kernels compile for Hopper, on any machine: the interpreter forgives too much."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from camera_serve.kernels import PackedRows, RaggedLayer, RaggedTier
from camera_serve.kernels.triton import moe, pack_layer
from camera_serve.kernels.triton.tiles import Tiles
from camera_serve.kernels.triton.tuned import TABLE

D_MODEL, NUM_EXPERTS, ROWS = 2048, 8, 64


class Hopper:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are cached by device: none of a real GPU's is mixed up with these.
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """PTX by kernel of what is called in the test, which is compiled but not run."""
    found: dict[str, str] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs).asm["ptx"]

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(moe, "_has_ptx", lambda x: True)
    yield found


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


@pytest.mark.parametrize(
    "bits, dtype, bound, num_tokens",
    [
        ((16,), torch.bfloat16, 2, 1),
        ((16,), torch.bfloat16, 192, 16),
        ((3, 2, 1), torch.bfloat16, 2, 16),
        ((16, 8, 4), torch.float16, 96, 16),
    ],
    ids=str,
)
def test_kernels_use_hopper_s_units(
    compiled: dict[str, str],
    bits: tuple[int, ...],
    dtype: torch.dtype,
    bound: int,
    num_tokens: int,
) -> None:
    x, ids = torch.zeros(num_tokens, D_MODEL, dtype=dtype), torch.zeros(num_tokens, 2).int()
    tiles = Tiles(**TABLE["dense" if bits == (16,) else "packed"][bound])
    moe.ragged_moe(x, ids.float(), ids, pack_layer(layer_of(bits, dtype), dtype), tiles)
    assert ("_route" in compiled) == (num_tokens > 1) and "add_up" in compiled
    for kernel in ("gate_up", "down"):
        ptx = compiled[kernel]
        # Weights travel asynchronously, 16 bytes at a time, to the matrix units.
        assert "cp.async.cg.shared.global [" in ptx and ", 0x10," in ptx
        assert "wgmma.mma_async" in ptx
