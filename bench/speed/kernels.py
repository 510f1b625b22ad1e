"""Time of one MoE layer on the CPU: our kernel under tier plans against vLLM's best.

    python -m bench.speed.kernels [--shape qwen3-30b-a3b ...] [--tokens 1,8,32] [--threads 1,2]
    python -m bench.speed.kernels --docs

The first checks the kernel, times everything and the machine's limits in turn and writes
`bench/results/`; the second only puts the stored table in docs/speed.md, or the part of it that
`--shape`, `--tokens`, `--threads` and `--routing` name.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.markdown import Markdown

from bench import reference
from bench.shapes.published import SHAPES, Shape
from bench.speed.contestants import (
    Contestant,
    DenseWeights,
    Run,
    camera,
    contestants,
    dequantized,
    fitting,
    name_of,
    own_of_vllm,
    random_layer,
    stock_contestants,
)
from bench.speed.kernel_report import (
    Cell,
    CheckedError,
    KernelReport,
    Place,
    PlaceLimits,
    TimedLayer,
    TimingSettings,
    console_tables,
    markdown,
    near_limits,
    notes,
)
from bench.speed.limits import Ruler
from bench.speed.moe_inputs import Inputs, Routing, inputs_of, work
from bench.stored import DOCS, put_in_page
from camera_serve.benchmark.environment import Environment
from camera_serve.checkpoint.writer import write_json
from camera_serve.errors import CameraError, KernelError, RecipeError
from camera_serve.kernels.cpu import isa
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.layer import ragged_moe as reference_moe
from camera_serve.recipe import TierPlan

RESULTS = reference.ROOT / "bench" / "results" / "kernels-cpu.json"
SHAPE = "qwen3-30b-a3b"
TOKENS = (1, 4, 8, 16, 32, 128, 512, 2048)
PLANS = ("16:1", "16:0.8,0:0.2", "16:0.6,0:0.4", "16:0.4,0:0.6", "3:0.2,2:0.6,1:0.2")
WHOLE = TierPlan.parse("16:1")
CHECKED_D_FF = 512
CHECKED_TOKENS = (1, 7, 160)
# Both kernels round to bf16 twice, so that their errors differ by chance alone, by up to 7% in
# trials; a third rounding would add 22%.
NOISE = 1.1
REPETITIONS = 5
ROUNDS = 4

PAGE = DOCS / "speed.md"

TimedPlace = tuple[PlaceLimits, list[Cell]]


def main() -> int:
    """Measure and store, or render what is stored; a mistake of the user ends with one line.

    1, or 2 where a flag is wrong whatever the machine.
    """
    # vLLM says what it found on the machine whenever it is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    options = _parse_options()
    try:
        if options.docs:
            _show_stored(options)
            return 0
        report = measure(_settings(options))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, report.model_dump(mode="json"))
    except (CameraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    for table in console_tables(report):
        Console().print(table)
    for note in (*near_limits(report), *notes(report)):
        print(f"note: {note}")
    return 0


def _show_stored(options: argparse.Namespace) -> None:
    report = KernelReport.read(options.output).only(
        shape=options.shape,
        tokens=options.tokens,
        threads=options.threads,
        routing=options.routing,
    )
    if not report.cells:
        raise CameraError(f"{options.output} has no such cells: measure them, or ask for fewer")
    table = markdown(report)
    Console().print(Markdown(table))
    put_in_page(PAGE, "kernels", table)


def measure(settings: TimingSettings) -> KernelReport:
    """Check, then time; raises `KernelError` for a kernel less exact than it should be."""
    plans = [TierPlan.parse(plan) for plan in settings.plans]
    _check_names(plans)
    _check_threads(settings.threads)
    shapes = {n: fitting(SHAPES[n], plans, settings.memory_limit) for n in settings.shapes}
    checks = [c for name in shapes for c in check(name, plans, settings.seed)]
    timed = [place for name in shapes for place in _timed_alone(name, shapes[name], settings)]
    return KernelReport(
        environment=Environment.here(os.environ),
        isa=isa(),
        settings=settings,
        limits=tuple(limits for limits, _ in timed),
        checks=tuple(checks),
        layers=tuple(_layer(name, shape) for name, shape in shapes.items()),
        cells=tuple(cell for _, cells in timed for cell in cells),
    )


def _layer(name: str, shape: Shape) -> TimedLayer:
    return TimedLayer(
        shape=name,
        num_experts=shape.num_experts,
        published_experts=SHAPES[name].num_experts,
    )


def check(name: str, plans: Sequence[TierPlan], seed: int) -> list[CheckedError]:
    """Every kernel's error against float64 on a smaller layer of a shape.

    Raises `KernelError` when ours is larger than that of vLLM's own dense kernel on the same layer,
    its packed rows dequantized to bf16, or not a number.
    """
    _say(f"{name}: checking")
    shape = _small(SHAPES[name])
    generator = torch.Generator().manual_seed(seed)
    dense = DenseWeights.random(shape, generator)
    inputs = [next(inputs_of(shape, n, "even", seed)) for n in CHECKED_TOKENS]
    whole = random_layer(shape, WHOLE, seed, dense, generator)
    stock = {c.name: relative_error(c.run, whole, inputs) for c in stock_contestants(dense)}
    bound = next(iter(stock.values()))
    found = [
        CheckedError(shape=name, contestant=c, error=error, vllm_error=bound)
        for c, error in stock.items()
    ]
    for plan in plans:
        layer = random_layer(shape, plan, seed, dense, generator)
        ours = camera(layer, plan, shape.d_model)
        error = relative_error(ours.run, layer, inputs)
        bound = relative_error(own_of_vllm(dequantized(layer, shape)).run, layer, inputs)
        # Written so that NaN is refused too.
        if not error <= NOISE * bound:
            raise KernelError(
                f"the CPU kernel is off by {error:.3g} on {name} with plan {plan}, vLLM's own by "
                f"{bound:.3g}: nothing was timed; another compiler, named in CXX, may do better"
            )
        found.append(CheckedError(shape=name, contestant=ours.name, error=error, vllm_error=bound))
    return found


def relative_error(run: Run, layer: RaggedLayer, inputs: Sequence[Inputs]) -> float:
    """The norm of the difference from float64 over all inputs, over the norm of the exact."""
    off = total = 0.0
    layer = _in_float64(layer)
    for x, weights, ids in inputs:
        exact = reference_moe(x.double(), weights, ids, layer)
        off += float((run(x, weights, ids) - exact).square().sum())
        total += float(exact.square().sum())
    return float((off / total) ** 0.5)


def _small(shape: Shape) -> Shape:
    """A layer of the same kind that float64 gets through in a second."""
    experts = min(shape.num_experts, 2 * shape.top_k)
    d_ff = min(shape.d_ff, CHECKED_D_FF)
    return shape.model_copy(update={"num_experts": experts, "d_ff": d_ff, "shared_d_ff": 0})


def _in_float64(layer: RaggedLayer) -> RaggedLayer:
    return RaggedLayer(tuple(_tier_in_float64(tier) for tier in layer.tiers))


def _tier_in_float64(tier: RaggedTier[Rows]) -> RaggedTier[Rows]:
    # Packed rows are dequantized in the dtype of x.
    gate, up, down = (
        m if isinstance(m, PackedRows) else m.double() for m in (tier.gate, tier.up, tier.down)
    )
    return RaggedTier(gate, up, down, tier.offsets)


def _timed_alone(name: str, shape: Shape, settings: TimingSettings) -> list[TimedPlace]:
    """Time a shape in a process of its own, because zentorch never gives back what it copied."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(time_shape, name, shape, settings).result()
        except BrokenProcessPool as error:
            raise CameraError(
                f"{name}: the process that timed it was killed, most often for memory: lower "
                f"--memory-limit below {settings.memory_limit / 1e9:.1f}"
            ) from error


def time_shape(name: str, shape: Shape, settings: TimingSettings) -> list[TimedPlace]:
    """Every place of one shape, all contestants in memory at once."""
    _say(f"{name}: making {shape.num_experts} experts for every kernel")
    plans = [TierPlan.parse(plan) for plan in settings.plans]
    generator = torch.Generator().manual_seed(settings.seed)
    rivals = list(contestants(shape, plans, settings.seed, generator))
    found = []
    for threads, routing, tokens in product(settings.threads, settings.routings, settings.tokens):
        _say(f"{name}: {routing} routing, threads {threads}, tokens {tokens}")
        torch.set_num_threads(threads)
        source = inputs_of(shape, tokens, routing, settings.seed)
        inputs = list(islice(source, ROUNDS * (shape.num_experts // shape.top_k)))
        ruler = Ruler(threads)
        times = time_in_turn(rivals, inputs, settings.seconds, ruler)
        place = Place(shape=name, routing=routing, threads=threads, tokens=tokens)
        cells = [_cell(place, rival, inputs, times[rival.name]) for rival in rivals]
        found.append((PlaceLimits(place=place, limits=ruler.limits()), cells))
    return found


def _cell(place: Place, rival: Contestant, inputs: Sequence[Inputs], seconds: list[float]) -> Cell:
    low, middle, high = statistics.quantiles(seconds, n=4)
    done = [work(rival, *given) for given in inputs]
    return Cell(
        place=place,
        contestant=rival.name,
        kind=rival.kind,
        repetitions=len(seconds),
        median_seconds=middle,
        quartiles_seconds=(low, high),
        read_bytes=statistics.mean(read for read, _ in done),
        flop=statistics.mean(flop for _, flop in done),
    )


def time_in_turn(
    rivals: Sequence[Contestant], inputs: Sequence[Inputs], seconds: float, ruler: Ruler
) -> dict[str, list[float]]:
    """Seconds of each contestant: all in turn on one input, then on the next, and so on.

    The machine's limits take their turn as well. As many rounds as `seconds` per contestant allow,
    but `REPETITIONS` at least.
    """
    for rival in rivals:
        rival.run(*inputs[-1])
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    end, done = time.perf_counter() + seconds * len(rivals), 0
    while done < REPETITIONS or time.perf_counter() < end:
        for rival in rivals:
            start = time.perf_counter()
            rival.run(*inputs[done % len(inputs)])
            times[rival.name].append(time.perf_counter() - start)
        start = time.perf_counter()
        ruler.measure()
        end += time.perf_counter() - start
        done += 1
    return times


def _check_names(plans: Sequence[TierPlan]) -> None:
    names = Counter(name_of(plan) for plan in plans)
    if twice := [name for name, count in names.items() if count > 1]:
        raise RecipeError(f"--plans has several of {twice[0]}: time them in runs of their own")


def _check_threads(threads: Sequence[int]) -> None:
    cores = len(os.sched_getaffinity(0))
    if max(threads) > cores:
        raise CameraError(f"--threads {max(threads)}: this process may use {cores} cores")


def _settings(options: argparse.Namespace) -> TimingSettings:
    return TimingSettings(
        shapes=options.shape or (SHAPE,),
        tokens=options.tokens or TOKENS,
        plans=options.plans,
        threads=options.threads or (1,),
        routings=options.routing or ("even",),
        seconds=options.seconds,
        seed=options.seed,
        memory_limit=int(options.memory_limit * 1e9),
    )


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.kernels")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help=f"default: {SHAPE}")
    parser.add_argument("--tokens", type=_counts, help=f"default: {','.join(map(str, TOKENS))}")
    parser.add_argument("--plans", nargs="+", default=PLANS, metavar="PLAN")
    parser.add_argument("--threads", type=_counts, help="such as 1,2; default: 1")
    parser.add_argument(
        "--routing",
        choices=get_args(Routing),
        nargs="+",
        help="experts at random, or those with more energy more often; default: even",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=2.0, help="of timing per kernel and cell"
    )
    parser.add_argument("--seed", type=int, default=0, help="also the layer widths are drawn of")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        default=0.9 * _free_bytes() / 1e9,
        help="for all kernels' weights together; default: 90%% of what is free",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only rewrite the table of docs/")
    return parser.parse_args()


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{min(counts)} is not 1 or more")
    return counts


def _seconds(text: str) -> float:
    if not 0 <= (seconds := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return seconds


def _free_bytes() -> int:
    """Memory that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(free)


def _say(what: str) -> None:
    print(f"kernels: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
