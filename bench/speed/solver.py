"""Time of one layer's solve: ours, batched over experts, against AutoGPTQ's expert by expert.

    python -m bench.speed.solver

64 experts, d_model 1024, d_ff 512, 2 bits, the same Hessians; alternating runs, medians.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import reference
from bench.stored import environment
from camera_serve.compression.quantize.gptq import solve_along_columns, solve_along_rows

RESULTS = reference.ROOT / "bench" / "results" / "solver.json"
EXPERTS, D_MODEL, D_FF, GROUP, ROUNDS = 64, 1024, 512, 128, 3


def auto_gptq_solver() -> Any:
    """`auto_gptq.quantization.gptq.GPTQ`, loaded alone from what `.ci/setup` fetched."""
    package = types.ModuleType("auto_gptq_solver")
    package.__path__ = [str(Path(sys.prefix) / "oracle" / "auto_gptq" / "quantization")]
    sys.modules["auto_gptq_solver"] = package
    torch.cuda.synchronize = lambda device=None: None
    return importlib.import_module("auto_gptq_solver.gptq").GPTQ


def main() -> None:
    """Time both in turn, print the ratio and store it."""
    argparse.ArgumentParser(
        prog="python -m bench.speed.solver",
        description=f"Our GPTQ solver against AutoGPTQ's on one layer of {EXPERTS} experts.",
    ).parse_args()
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * D_FF, D_MODEL, generator=generator) * 0.02
    down = torch.randn(EXPERTS, D_MODEL, D_FF, generator=generator) * 0.02
    hessians = [_hessian(columns, generator) for columns in (D_MODEL, D_FF)]
    solver = auto_gptq_solver()
    times: dict[str, list[float]] = {"camera-serve": [], "auto-gptq": []}
    for _ in range(ROUNDS):
        times["camera-serve"].append(_timed(lambda: _ours(gate_up, down, hessians)))
        times["auto-gptq"].append(_timed(lambda: _theirs(solver, gate_up, down, hessians)))
    ratios = [a / b for a, b in zip(times["auto-gptq"], times["camera-serve"], strict=True)]
    result = {"version": 2, "environment": environment(), "seconds": times, "ratios": ratios}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"auto-gptq / camera-serve, median of {ROUNDS}: {statistics.median(ratios):.2f}")


def _hessian(columns: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(EXPERTS, 2 * columns, columns, generator=generator)
    return x.transpose(1, 2) @ x


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ours(gate_up: torch.Tensor, down: torch.Tensor, hessians: list[torch.Tensor]) -> None:
    levels = gate_up.new_full(gate_up.shape[:2], 3)
    solve_along_columns(gate_up, hessians[0], levels, GROUP)
    solve_along_rows(down, hessians[1], down.new_full((EXPERTS, D_FF), 3), GROUP)


def _theirs(
    solver: Any, gate_up: torch.Tensor, down: torch.Tensor, hessians: list[torch.Tensor]
) -> None:
    for expert in range(EXPERTS):
        matrices = (*gate_up[expert].chunk(2), down[expert])
        for matrix, hessian in zip(matrices, (0, 0, 1), strict=True):
            linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            linear.weight.data = matrix.clone()
            one = solver(linear)
            one.quantizer.configure(2, perchannel=True, sym=False)
            one.H, one.nsamples = hessians[hessian][expert].clone(), 1
            one.fasterquant(group_size=GROUP)


if __name__ == "__main__":
    main()
