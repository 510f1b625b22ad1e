"""What a served model could gain from its faster MoE layers, beside what it did gain.

    python -m bench.speed.amdahl SERVED.json [--kernels KERNELS.json]

SERVED.json is of `camera-serve bench`: the dense model first, and among the others one whose
experts are all but gone (`bench.shapes … --plan 16:0.01,0:0.99`), which takes the time of all that
is not MoE. What is left of the dense model's time is divided by the layer's own gain, of
`bench.speed.kernels`, over the prompts and the single tokens of one wave of answers.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from bench.shapes.published import SHAPES
from bench.speed.contestants import name_of
from bench.speed.kernel_report import Cell, KernelReport
from bench.speed.kernels import RESULTS as KERNELS
from bench.speed.kernels import SHAPE
from bench.speed.moe_inputs import Routing
from camera_serve.benchmark.report import BenchedModel, BenchReport, median
from camera_serve.benchmark.settings import Load
from camera_serve.checkpoint.reader import read_json
from camera_serve.errors import CameraError
from camera_serve.recipe import TierPlan, describe_errors

ALL_BUT_GONE = 0.98
"""Share of the micro-experts that a model has pruned whose time is that of the rest."""


@dataclass(frozen=True)
class Gain:
    """Output tokens/s over the dense model's: as measured, and as the layer's own gain allows.

    moe_share: of the dense model's time; layer: how much faster the MoE layer alone is.
    """

    model: str
    load: Load
    moe_share: float
    layer: float
    measured: float

    @property
    def allowed(self) -> float:
        """Amdahl's law."""
        return 1 / (1 - self.moe_share + self.moe_share / self.layer)


def main() -> int:
    """Print the gains; a mistake of the user ends with one line."""
    options = _parse_options()
    try:
        kernels = KernelReport.read(options.kernels).only(
            shape=[options.shape], routing=[options.routing]
        )
        found = list(gains(_served(options.served), kernels))
    except (CameraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(_table(found, f"layers of {options.shape}, {options.routing} routing"))
    return 0


def gains(served: BenchReport, kernels: KernelReport) -> Iterator[Gain]:
    """Every compressed model under every load of so many requests at once.

    kernels: of the layer's shape and routing that was served, and of no other. Raises `CameraError`
    when a model or a time is missing that this needs.
    """
    threads = served.settings.threads
    if threads is None:
        raise CameraError("the models were served on all cores: serve them with --threads N")
    kernels = kernels.only(threads=[threads])
    dense, *others = served.models
    rest = _rest(others)
    for load in served.settings.loads:
        if load.concurrency is None:
            continue
        seconds = {m.name: 1 / _tokens_per_second(served, m, load) for m in served.models}
        whole = seconds[dense.name]
        for model in others:
            if model is not rest:
                yield Gain(
                    model=model.name,
                    load=load,
                    moe_share=1 - seconds[rest.name] / whole,
                    layer=_layer_gain(model, load.concurrency, served, kernels),
                    measured=whole / seconds[model.name],
                )


def _rest(models: list[BenchedModel]) -> BenchedModel:
    for model in models:
        if model.plan and TierPlan.parse(model.plan).pruned >= ALL_BUT_GONE:
            return model
    raise CameraError(
        f"no model has {ALL_BUT_GONE:.0%} of its micro-experts pruned: serve one more, made by "
        "`python -m bench.shapes … --plan 16:0.01,0:0.99`, for the time of all that is not MoE"
    )


def _tokens_per_second(served: BenchReport, model: BenchedModel, load: Load) -> float:
    found = median(run.output_tokens_per_second for run in served.runs(model.name, load))
    if found is None:
        raise CameraError(f"{model.name} was not served with {load.name}: run the benchmark again")
    return found


def _layer_gain(
    model: BenchedModel, concurrency: int, served: BenchReport, kernels: KernelReport
) -> float:
    """Of one wave: all its prompts at once, and then one token of each answer at a time."""
    if model.plan is None:
        raise CameraError(f"{model.name} was not compressed by camera-serve: leave it out")
    ours = name_of(TierPlan.parse(model.plan))
    settings = served.settings

    def wave(name: str | None) -> float:
        cells = _cells(kernels, name)
        if not cells:
            raise CameraError(
                f"no times of {name or 'dense kernels'} on this layer with {settings.threads} "
                f"threads: run `python -m bench.speed.kernels --threads {settings.threads}` with "
                "that plan"
            )
        prompts = _seconds(cells, concurrency * settings.input_len)
        return prompts + (settings.output_len - 1) * _seconds(cells, concurrency)

    return wave(None) / wave(ours)


def _cells(kernels: KernelReport, name: str | None) -> list[Cell]:
    """The cells of one kernel by rising number of tokens; None: of the fastest dense one."""
    if name is None:
        dense = [cell for cell in kernels.cells if cell.kind == "dense"]
        found = [kernels.dense(place) for place in dict.fromkeys(cell.place for cell in dense)]
    else:
        found = [cell for cell in kernels.cells if cell.contestant == name]
    return sorted(found, key=lambda cell: cell.place.tokens)


def _seconds(cells: list[Cell], tokens: int) -> float:
    """The time at a number of tokens, on the straight line between its measured neighbours."""
    for low, high in pairwise(cells):
        if low.place.tokens <= tokens <= high.place.tokens:
            share = (tokens - low.place.tokens) / (high.place.tokens - low.place.tokens)
            return low.median_seconds + share * (high.median_seconds - low.median_seconds)
    measured = f"{cells[0].place.tokens} to {cells[-1].place.tokens}"
    raise CameraError(f"{tokens} tokens are outside of what was timed, {measured}: time more")


def _table(found: list[Gain], title: str) -> Table:
    columns = ("at once", "model", "MoE's share", "layer", "allowed", "measured", "of allowed")
    table = Table(*columns, title=title)
    for gain in found:
        table.add_row(
            str(gain.load.concurrency),
            gain.model,
            f"{gain.moe_share:.0%}",
            f"{gain.layer:.2f}×",
            f"{gain.allowed:.2f}×",
            f"{gain.measured:.2f}×",
            f"{gain.measured / gain.allowed:.0%}",
        )
    return table


def _served(path: Path) -> BenchReport:
    if not path.exists():
        raise CameraError(f"{path} is missing: run `camera-serve bench` first")
    try:
        return BenchReport.model_validate(read_json(path))
    except ValidationError as error:
        raise CameraError(
            f"{path} is no result of `camera-serve bench`: {describe_errors(error)}"
        ) from error


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.amdahl")
    parser.add_argument("served", type=Path, help="result of `camera-serve bench`")
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE, help="that was served")
    parser.add_argument(
        "--routing",
        choices=get_args(Routing),
        default="even",
        help="even for models of `bench.shapes --balanced`",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
