"""`camera-serve analyze`: CAMERA's ranking of a model's micro-experts, without changing it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camera_serve.cli.formatting import percent, skipped_line, table
from camera_serve.cli.options import (
    CALIBRATION_FLAGS,
    RUN_FLAGS,
    calibration_values,
    output_option,
    validated,
    with_flags,
)
from camera_serve.cli.progress import shown_progress
from camera_serve.errors import quoted

if TYPE_CHECKING:
    from camera_serve.compression.analysis import AnalysisReport, LayerSummary


@click.command(short_help="Rank a model's micro-experts by energy.")
@click.argument("model")
@output_option
@with_flags(CALIBRATION_FLAGS)
@with_flags(RUN_FLAGS)
def analyze(model: str, output: Path, **flags: Any) -> None:
    """Measure what every micro-expert of MODEL is worth and write it to -o.

    Written are energies, a ranking, and what compress begins with: give it the folder with
    --analysis, for any number of sizes.
    """
    from camera_serve import AnalysisSettings
    from camera_serve import analyze as run

    settings = validated(AnalysisSettings, calibration_values(flags))
    with shown_progress() as on_progress:
        report = run(
            model,
            output,
            settings,
            device=flags["device"],
            overwrite=flags["overwrite"],
            on_progress=on_progress,
        )
    click.echo(_summary(report))
    if report.skipped:
        click.echo(skipped_line(report.skipped))
    command = f"camera-serve compress {quoted(model)} -o OUT --analysis {quoted(output)}"
    click.echo(f"wrote {output}; next: {command} --prune 0.4")


def _summary(report: "AnalysisReport") -> str:
    pruned = tuple(report.layers[0].energy_below)
    columns = tuple(f"below {share}" for share in pruned)
    header = ("layer", "fewest tokens", "most", "unseen", "top expert", "shared", *columns)
    return (
        f"{table(header, [_row(layer) for layer in report.layers])}\n"
        "tokens: calibration tokens of the least and most used expert, and experts that saw none\n"
        "top expert, shared: their share of the layer's energy; below 40%: the energy that pruning "
        "40% removes\n"
    )


def _row(layer: "LayerSummary") -> tuple[object, ...]:
    tokens = layer.tokens_per_expert
    top = max(range(len(layer.expert_shares)), key=layer.expert_shares.__getitem__)
    return (
        layer.layer,
        min(tokens),
        max(tokens),
        tokens.count(0),
        f"{top}: {percent(layer.expert_shares[top])}",
        percent(layer.shared_share) if layer.shared_share else "-",
        *(f"{100 * share:.2f}%" for share in layer.energy_below.values()),
    )
