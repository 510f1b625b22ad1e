"""Time on the GPU itself: events around replayed CUDA graphs, inputs in rotation, medians."""

import statistics
from collections.abc import Callable, Mapping

import torch

ROUNDS = 7
SECONDS_A_ROUND = 0.03
WARM_UPS = 3
GIGABYTE, TERAFLOP = 1e9, 1e12

Run = Callable[[int], object]
"""Computes with one of several input sets, counted from 0."""


def compare(runs: Mapping[str, Run], num_sets: int) -> dict[str, float]:
    """Median microseconds of one call of each; they take turns, so that clocks favour none.

    Each is captured as one CUDA graph of a call with every input set, so that neither launches from
    the host nor what the last call left in the cache are measured.
    """
    graphs = {name: _capture(run, num_sets) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    replays = {name: _replays(graph) for name, graph in graphs.items()}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            elapsed = _milliseconds(graph, replays[name]) / replays[name]
            times[name].append(elapsed * 1000 / num_sets)
    return {name: statistics.median(found) for name, found in times.items()}


def median_seconds(run: Callable[[], object], rounds: int = 3) -> float:
    """Of what takes seconds and was run before; from the GPU's first operation to its last."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this card reaches: bytes read and written per second, and bfloat16 products."""
    source = torch.empty(2**32, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    runs: dict[str, Run] = {
        "copy": lambda _: target.copy_(source),
        "matmul": lambda _: torch.mm(a, b, out=out),
    }
    microseconds = compare(runs, num_sets=1)
    return {
        "copy_gb_per_second": 2 * source.nbytes / GIGABYTE / (microseconds["copy"] * 1e-6),
        "bf16_tflop_per_second": 2 * 8192**3 / TERAFLOP / (microseconds["matmul"] * 1e-6),
    }


def _capture(run: Run, num_sets: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for which in range(num_sets):
                run(which)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for which in range(num_sets):
            run(which)
    return graph


def _replays(graph: torch.cuda.CUDAGraph) -> int:
    _milliseconds(graph, WARM_UPS)
    once = _milliseconds(graph, 1)
    return max(1, min(1000, round(SECONDS_A_ROUND * 1000 / max(once, 1e-3))))


def _milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
