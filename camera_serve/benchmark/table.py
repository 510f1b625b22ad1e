"""A benchmark's report as tables: medians over the repeats, and ratios over the first model."""

from collections.abc import Callable, Iterable

from rich.table import Table

from camera_serve.benchmark.report import BenchReport, ServingRun, median

SERVING_FIGURES: dict[str, Callable[[ServingRun], float]] = {
    "output tokens/s": lambda run: run.output_tokens_per_second,
    "TTFT ms": lambda run: run.ttft_ms.median,
    "TPOT ms": lambda run: run.tpot_ms.median,
}


def serving_table(report: BenchReport) -> Table:
    """Speed and delays of each model under each load of `vllm bench serve`.

    And the share of guessed tokens that were accepted, where a server speculated.
    """
    speculated = any(run.drafts for run in report.serving)
    more = ("drafts accepted",) if speculated else ()
    table = _table("vllm bench serve", "load", "model", *SERVING_FIGURES, *more)
    for load in report.settings.loads:
        columns = [
            _compared(median(map(figure, report.runs(m.name, load))) for m in report.models)
            for figure in SERVING_FIGURES.values()
        ]
        if speculated:
            columns.append([_accepted(report.runs(m.name, load)) for m in report.models])
        for model, *cells in zip(report.models, *columns, strict=True):
            table.add_row(load.name, model.name, *cells)
        table.add_section()
    return table


def model_table(report: BenchReport) -> Table:
    """Size, memory, and the speed of vLLM's offline benchmarks, model by model."""
    columns = {
        "weights GB": (model.weight_bytes / 1e9 for model in report.models),
        "resident GB": _memory(report, "resident_bytes"),
        "peak GB": _memory(report, "peak_resident_bytes"),
        "on device GB": _memory(report, "model_bytes"),
        "throughput tokens/s": (
            median(r.output_tokens_per_second for r in report.throughput if r.model == model.name)
            for model in report.models
        ),
        "latency s": (
            median(r.median_seconds for r in report.latency if r.model == model.name)
            for model in report.models
        ),
    }
    known = {name: cells for name, values in columns.items() if any(cells := _compared(values))}
    table = _table("model, and vllm bench throughput and latency", "model", "plan", *known)
    for model, *cells in zip(report.models, *known.values(), strict=True):
        table.add_row(model.name, model.plan or "-", *cells)
    return table


def _accepted(runs: Iterable[ServingRun]) -> str:
    share = median(run.drafts.accepted_share if run.drafts else None for run in runs)
    return "" if share is None else f"{share:.0%}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _memory(report: BenchReport, name: str) -> Iterable[float | None]:
    for model in report.models:
        found = median(getattr(m, name) for m in report.memory if m.model == model.name)
        yield found / 1e9 if found is not None else None


def _compared(values: Iterable[float | None]) -> list[str]:
    """`12.3 (1.40×)`: each value, and its ratio over the first; empty where it is unknown."""
    first, *others = values
    cells = ["" if first is None else f"{first:.4g}"]
    for value in others:
        cells.append(f"{value:.4g} ({value / first:.2f}×)" if value and first else "")
    return cells
