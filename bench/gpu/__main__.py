"""Everything a GPU is for, in pieces of a few minutes each; correctness before every figure.

    python -m bench.gpu --only layers [--shapes qwen3-30b-a3b …] [--tokens 1 64 …] [--balanced]
    python -m bench.gpu --only serve [--models dense "40% pruned" "2.25 bits"]
    python -m bench.gpu --only analysis

Writes `bench/results/gpu-<piece>.json` after every measurement and prints a short table last. A
piece ends before it has run for `--minutes`, and says what it left out: no figure is lost with a
machine that is lent for a while.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import reference
from bench.gpu import analysis, layers, serve
from bench.shapes.published import SHAPES
from camera_serve.benchmark.environment import Environment
from camera_serve.checkpoint.writer import write_json
from camera_serve.errors import CameraError

Result = dict[str, Any]

RESULTS = reference.ROOT / "bench" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure one piece; 1 with one line on stderr where there is nothing right to measure."""
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here: nothing to measure", file=sys.stderr)
        return 1
    torch.manual_seed(options.seed)
    pieces, table = _piece(options)
    try:
        result = keep(pieces, options.output, 60 * options.minutes)
    except (layers.WrongResultError, analysis.DisagreementError, CameraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if result["left"]:
        print(f"time is up; not measured: {', '.join(result['left'])}")
    return 0


def keep(pieces: Iterator[Result], output: Path, seconds: float) -> Result:
    """Write every result as soon as it is there; the last one, when there is no time for more.

    pieces: the same result over and over, each time with one measurement more and less `left`.
    """
    environment = Environment.here(os.environ).model_dump(mode="json")
    output.parent.mkdir(parents=True, exist_ok=True)
    start = before = time.monotonic()
    longest, result = 0.0, {}
    for result in pieces:
        write_json(output, {"version": 1, "environment": environment, **result})
        now = time.monotonic()
        longest, before = max(longest, now - before), now
        if now - start + longest > seconds:
            break
    return result


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What to measure, and where to."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", required=True, choices=("layers", "serve", "analysis"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=layers.TOKENS)
    parser.add_argument("--balanced", action="store_true", help="experts see as many tokens each")
    parser.add_argument("--models", nargs="+", choices=serve.PLANS, default=tuple(serve.PLANS))
    parser.add_argument("--minutes", type=float, default=9, help="for the whole piece")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu-<piece>.json")
    options = parser.parse_args(arguments)
    options.output = options.output or RESULTS / f"gpu-{options.only}.json"
    return options


def _piece(options: argparse.Namespace) -> tuple[Iterator[Result], Callable[[Result], str]]:
    if options.only == "serve":
        return serve.measure(options.models, seed=options.seed), serve.table
    if options.only == "analysis":
        return analysis.measure(seed=options.seed), analysis.table
    pieces = layers.measure(
        options.shapes, options.tokens, balanced=options.balanced, seed=options.seed
    )
    return pieces, layers.table


if __name__ == "__main__":
    sys.exit(main())
