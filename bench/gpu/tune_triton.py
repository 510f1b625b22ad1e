"""Regenerate the Triton kernels' tile sizes on this machine's GPU.

    python -m bench.gpu.tune_triton [--shapes qwen3-30b-a3b …] [--seconds 480] [--output FILE]

For each kind of layer and each bound of slots per expert in the present table, one setting after
another is tried with the values of its grid while the others stay (coordinate descent, two sweeps),
each judged by the geometric mean of its times over the shapes. Wrong results and settings that do
not fit the GPU are passed over. Rewrites this GPU's part of `camera_serve/kernels/triton/tuned.py`;
a part was reasoned from compiled kernels and not timed, as long as DEVICES says so.
"""

# mypy: disable-error-code="import-untyped"

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.gpu.layers import PLANS, TOLERANCE, exact_output
from bench.gpu.random_layers import DTYPE, Tokens, ragged_layer, random_tokens
from bench.gpu.timing import Run, compare
from bench.shapes.published import SHAPES
from camera_serve.kernels.triton import TritonLayer, pack_layer, ragged_moe
from camera_serve.kernels.triton import tuned as present
from camera_serve.kernels.triton.tiles import Tiles, matrix_unit

LAYERS = {"dense": "40%", "packed": "2.25 bits"}
SWEEPS = 2
GRID: Mapping[str, Sequence[int]] = {
    "block": (16, 32, 64, 128),
    "rows": (16, 32, 64, 128),
    "step": (64, 128, 256),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "registers": (128, 168, 255),
    "columns": (64, 128, 256),
    "down_parts": (1, 2, 4),
    "down_step": (32, 64, 128),
    "down_warps": (4, 8),
    "down_stages": (2, 3, 4, 5),
    "down_registers": (128, 168, 255),
    "programs": (1, 2, 3, 4),
}
HEADER = '''"""Tile sizes by matrix unit, kind of layer and most slots per expert.

Written by `python -m bench.gpu.tune_triton`, for the unit of the GPU that it runs on.
"""
'''

Table = dict[str, dict[int, dict[str, int]]]
_TABLES_TYPE = "dict[str, dict[str, dict[int, dict[str, int]]]]"


@dataclass(frozen=True)
class Trial:
    """A layer, tokens for it, and what it is to answer."""

    layer: TritonLayer
    inputs: list[Tokens]
    wanted: torch.Tensor


def main() -> int:
    """Tune until the time is over; what was found by then is written."""
    options = _parse_options()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here: nothing to time", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    unit = matrix_unit(torch.device("cuda", torch.cuda.current_device()))
    table: Table = {kind: dict(rows) for kind, rows in present.TABLES[unit].items()}
    tuned: list[str] = []
    for kind, bound in _rows(table):
        if time.monotonic() > deadline:
            print(f"{kind}, {bound} slots per expert: not tuned, the time is over")
            continue
        start = Tiles(**table[kind][bound])
        best = descend(_trials(options.shapes, kind, bound), start, deadline)
        table[kind][bound] = asdict(best)
        tuned.append(f"{kind} {bound}")
        card = f"{torch.cuda.get_device_name()}: {', '.join(tuned)}"
        write_tables(options.output, present.DEVICES | {unit: card}, present.TABLES | {unit: table})
        print(f"wrote {options.output}, tuned so far: {', '.join(tuned)}", flush=True)
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune_triton")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=("qwen3-30b-a3b",))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--output", type=Path, default=Path(present.__file__))
    return parser.parse_args()


def _rows(table: Table) -> Iterator[tuple[str, int]]:
    # The rows of both kinds that few tokens use come first: they matter most for serving.
    bounds = sorted({bound for rows in table.values() for bound in rows})
    return ((kind, bound) for bound in bounds for kind in table if bound in table[kind])


def _trials(shapes: Sequence[str], kind: str, bound: int) -> list[Trial]:
    device, trials = torch.device("cuda"), []
    for name in shapes:
        shape = SHAPES[name]
        layer = ragged_layer(shape, PLANS[LAYERS[kind]], 0, device)
        count = max(1, round(bound * 0.7 * shape.num_experts / shape.top_k))
        inputs = [random_tokens(shape, count, 0, device, balanced=False) for _ in range(4)]
        wanted = exact_output(layer, inputs[0])
        trials.append(Trial(pack_layer(layer, DTYPE), inputs, wanted))
    return trials


def descend(trials: Sequence[Trial], start: Tiles, deadline: float) -> Tiles:
    """The best tiles found by changing one setting at a time."""
    best, score = start, score_of(trials, start)
    for name, values in list(GRID.items()) * SWEEPS:
        for value in values:
            candidate = replace(best, **{name: value})
            if candidate == best or time.monotonic() > deadline:
                continue
            found = score_of(trials, candidate)
            if found < score:
                best, score = candidate, found
                print(f"  {name} = {value}: {score:.1f} us", flush=True)
    return best


def score_of(trials: Sequence[Trial], tiles: Tiles) -> float:
    """Geometric mean of microseconds; infinite where the tiles do not fit or answer wrongly."""
    logarithms = []
    for trial in trials:
        try:
            out = _run(trial, tiles, 0).float()
        except (OutOfResources, PTXASError, CompilationError):
            return math.inf
        except RuntimeError as error:
            # What Triton says of a tile that one of its passes cannot do.
            if "PassManager" in str(error):
                return math.inf
            raise
        if not float((out - trial.wanted).norm() / trial.wanted.norm()) <= TOLERANCE:
            return math.inf
        timed = compare({"": _rotating(trial, tiles)}, len(trial.inputs))
        logarithms.append(math.log(timed[""]))
    return math.exp(sum(logarithms) / len(logarithms))


def _rotating(trial: Trial, tiles: Tiles) -> Run:
    return lambda which: _run(trial, tiles, which)


def _run(trial: Trial, tiles: Tiles, which: int) -> torch.Tensor:
    tokens = trial.inputs[which]
    return ragged_moe(tokens.x, tokens.weights, tokens.ids, trial.layer, tiles)


def write_tables(path: Path, devices: Mapping[str, str], tables: Mapping[str, Table]) -> None:
    """Write `tuned.py`, as the formatter leaves it."""
    body = "\n\n".join(
        (f"DEVICES = {_literal(devices)}", f"TABLES: {_TABLES_TYPE} = {_literal(tables)}")
    )
    path.write_text(f"{HEADER}\n{body}\n")


def _literal(value: object, indent: str = "") -> str:
    """Nested dicts, an entry a line."""
    if not isinstance(value, Mapping):
        return json.dumps(value)
    inner = indent + "    "
    lines = [
        f"{inner}{json.dumps(k) if isinstance(k, str) else k}: {_literal(v, inner)},"
        for k, v in value.items()
    ]
    return "\n".join(["{", *lines, indent + "}"])


if __name__ == "__main__":
    sys.exit(main())
