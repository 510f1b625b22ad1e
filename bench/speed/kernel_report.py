"""What `python -m bench.speed.kernels` found, as one versioned JSON, and the tables people read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError
from rich.table import Table

from bench.speed.contestants import Kind
from bench.speed.limits import Limits
from bench.speed.moe_inputs import Routing
from camera_serve.benchmark.environment import Environment
from camera_serve.checkpoint.reader import read_json
from camera_serve.errors import CameraError
from camera_serve.recipe import Settings, describe_errors

T = TypeVar("T")

UNPRUNED = "λ = 0%"


class TimingSettings(Settings):
    """What to time: every combination of shape, routing, threads and tokens is a cell.

    `plans` as `TierPlan` reads them. `seconds` of timing per contestant of a cell. `seed` is also
    the layer whose widths are drawn. `memory_limit`: bytes all contestants may take together.
    """

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    plans: tuple[str, ...]
    threads: tuple[int, ...]
    routings: tuple[Routing, ...]
    seconds: float = Field(ge=0)
    seed: int = 0
    memory_limit: int


class CheckedError(Settings):
    """A contestant's relative error against float64 on a smaller layer of a shape.

    `vllm_error`: that of vLLM's own dense kernel on the same layer, dequantized to bf16.
    """

    shape: str
    contestant: str
    error: float
    vllm_error: float


class TimedLayer(Settings):
    """A layer that was timed; it has fewer experts than the published one where memory is short."""

    shape: str
    num_experts: int
    published_experts: int


class Place(Settings):
    """What kernels must have in common to be compared."""

    shape: str
    routing: Routing
    threads: int
    tokens: int


class PlaceLimits(Settings):
    """What the machine could do while a place was timed."""

    place: Place
    limits: Limits


class Cell(Settings):
    """One kernel's time at one place.

    `read_bytes`: of the experts that were routed to; `flop`: two per weight and token; both are
    means over the inputs.
    """

    place: Place
    contestant: str
    kind: Kind
    repetitions: int
    median_seconds: float
    quartiles_seconds: tuple[float, float]
    read_bytes: float
    flop: float


class KernelReport(Settings):
    """A whole run. `isa`: the instruction set our kernel used."""

    version: Literal[3] = 3
    environment: Environment
    isa: str
    settings: TimingSettings
    limits: tuple[PlaceLimits, ...]
    checks: tuple[CheckedError, ...]
    layers: tuple[TimedLayer, ...]
    cells: tuple[Cell, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """A stored report; raises `CameraError` for a file that is none."""
        if not path.exists():
            raise CameraError(f"{path} is missing: run `python -m bench.speed.kernels` first")
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CameraError(
                f"{path} is not a kernel benchmark this version reads: {describe_errors(error)}; "
                "measure again"
            ) from error

    def at(self, place: Place) -> list[Cell]:
        """The kernels that were timed at a place."""
        return [cell for cell in self.cells if cell.place == place]

    def limits_of(self, threads: int) -> Limits:
        """The machine's limits with so many threads, over all places of `cells`."""
        places = {cell.place for cell in self.cells if cell.place.threads == threads}
        return Limits.middle(one.limits for one in self.limits if one.place in places)

    def limits_at(self, place: Place) -> Limits:
        """The machine's limits while a place was timed."""
        return next(one.limits for one in self.limits if one.place == place)

    def dense(self, place: Place) -> Cell:
        """The fastest dense kernel at a place."""
        rivals = [cell for cell in self.at(place) if cell.kind == "dense"]
        return min(rivals, key=lambda cell: cell.median_seconds)

    def ratio(self, cell: Cell) -> float:
        """How many times faster than the fastest dense kernel."""
        return self.dense(cell.place).median_seconds / cell.median_seconds

    def only(self, **values: Iterable[str | int] | None) -> Self:
        """The cells whose place has one of the given values in each field; None means any."""
        wanted = {name: set(allowed) for name, allowed in values.items() if allowed is not None}
        cells = [
            cell
            for cell in self.cells
            if all(getattr(cell.place, name) in allowed for name, allowed in wanted.items())
        ]
        return self.model_copy(update={"cells": tuple(cells)})


def console_tables(report: KernelReport) -> Iterator[Table]:
    """One table per shape, routing and number of threads."""
    for same in _unique((c.place.shape, c.place.routing, c.place.threads) for c in report.cells):
        shape, routing, threads = same
        here = report.only(shape=[shape], routing=[routing], threads=[threads])
        limits = here.limits_of(threads)
        title = f"{shape}, {routing} routing, {_threads(threads)}; the machine {limits}"
        table = Table(title=title, title_justify="left")
        for column in ("tokens", "kernel", "ms", "× dense", "GB/s", "GFLOP/s"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for place in _unique(cell.place for cell in here.cells):
            for cell in here.at(place):
                table.add_row(str(place.tokens), cell.contestant, *_figures(cell, here))
            table.add_section()
        yield table


def markdown(report: KernelReport) -> str:
    """The speed over the fastest dense kernel, one line per number of tokens."""
    names = _unique(cell.contestant for cell in report.cells if cell.kind != "dense")
    columns = ["layer", "routing", "threads", "tokens", "fastest dense", *names]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for place in _unique(cell.place for cell in report.cells):
        cells = {cell.contestant: cell for cell in report.at(place)}
        dense = report.dense(place)
        found = [f"{report.ratio(cells[n]):.2f}×" if n in cells else "" for n in names]
        where = (place.shape, place.routing, str(place.threads), str(place.tokens))
        lines.append("| " + " | ".join([*where, dense.contestant, *found]) + " |")
    return "\n".join([*lines, "", _caption(report)])


def notes(report: KernelReport) -> Iterator[str]:
    """What a reader must know before comparing with other machines' figures."""
    for layer in report.layers:
        if layer.num_experts < layer.published_experts:
            yield (
                f"{layer.shape} with {layer.num_experts} of {layer.published_experts} experts, "
                f"as many as fit {report.settings.memory_limit / 1e9:.1f} GB"
            )
    if "zentorch" not in {cell.contestant for cell in report.cells}:
        yield "zentorch is not installed, so vLLM's own kernel alone is the baseline"


def near_limits(report: KernelReport) -> Iterator[str]:
    """How near our kernel comes to the machine's limits on each unpruned 16-bit layer."""
    whole = [c for c in report.cells if c.kind == "camera" and c.contestant == UNPRUNED]
    for same in _unique((c.place.shape, c.place.routing, c.place.threads) for c in whole):
        shape, routing, threads = same
        here = [c for c in whole if (c.place.shape, c.place.routing, c.place.threads) == same]
        few, many = (f(here, key=lambda c: c.place.tokens) for f in (min, max))
        most = report.limits_at(few.place).read_bytes_per_second
        read = few.read_bytes / few.median_seconds / most
        found = f"{read:.0%} of the machine's reading rate at {_tokens(few)}"
        if flop := report.limits_at(many.place).bf16_flop_per_second:
            computed = many.flop / many.median_seconds / flop
            found += f" and {computed:.0%} of its bf16 rate at {_tokens(many)}"
        yield f"{UNPRUNED} on {shape} ({routing} routing, {_threads(threads)}) reaches {found}"


def _tokens(cell: Cell) -> str:
    return f"{cell.place.tokens} token" + "s" * (cell.place.tokens > 1)


def _caption(report: KernelReport) -> str:
    found = report.environment
    names = [n for n in ("torch", "vllm", "zentorch") if n in found.packages]
    versions = [f"{name} {found.packages[name]}" for name in names]
    used = _unique(cell.place.threads for cell in report.cells)
    limits = [f"with {_threads(count)} {report.limits_of(count)}" for count in used]
    layer = report.settings.seed
    parts = [
        "One MoE layer, median times; × is the speed over the fastest dense kernel in the same run",
        f"Widths are those of layer {layer} of the energies' spread on the reference MoE",
        *near_limits(report),
        *notes(report),
        f"{found.cpu} ({report.isa}): {'; '.join(limits)}",
        ", ".join([*versions, f"commit {found.commit}"]),
    ]
    return ". ".join(parts) + "."


def _figures(cell: Cell, report: KernelReport) -> list[str]:
    seconds = cell.median_seconds
    rates = [f"{amount / seconds / 1e9:.1f}" for amount in (cell.read_bytes, cell.flop)]
    return [f"{seconds * 1e3:.2f}", f"{report.ratio(cell):.2f}", *rates]


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
