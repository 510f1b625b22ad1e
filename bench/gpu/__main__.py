"""Everything a GPU is for, in pieces of a few minutes each; correctness before every figure.

    python -m bench.gpu --only layers [--shapes qwen3-30b-a3b …] [--tokens 1 64 …] [--balanced]
    python -m bench.gpu --only serve
    python -m bench.gpu --only analysis

Writes `bench/results/gpu-<piece>.json` and prints a short table last.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench import reference
from bench.gpu import analysis, layers, serve
from bench.shapes import SHAPES
from camera_serve.benchmark.environment import Environment
from camera_serve.checkpoint.writer import write_json
from camera_serve.errors import CameraError

RESULTS = reference.ROOT / "bench" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure one piece; 1 with one line on stderr where there is nothing right to measure."""
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here: nothing to measure", file=sys.stderr)
        return 1
    torch.manual_seed(options.seed)
    try:
        result, table = _measure(options)
    except (layers.WrongResultError, analysis.DisagreementError, CameraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = Environment.here(os.environ).model_dump(mode="json")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {"version": 1, "environment": environment, **result})
    print(table)
    return 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What to measure, and where to."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", required=True, choices=("layers", "serve", "analysis"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=layers.TOKENS)
    parser.add_argument("--balanced", action="store_true", help="experts see as many tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu-<piece>.json")
    options = parser.parse_args(arguments)
    options.output = options.output or RESULTS / f"gpu-{options.only}.json"
    return options


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if options.only == "serve":
        result = serve.measure(seed=options.seed)
        return result, serve.table(result)
    if options.only == "analysis":
        result = analysis.measure(seed=options.seed)
        return result, analysis.table(result)
    result = layers.measure(
        options.shapes, options.tokens, balanced=options.balanced, seed=options.seed
    )
    return result, layers.table(result)


if __name__ == "__main__":
    sys.exit(main())
