"""`camera-serve inspect`: what a checkpoint holds."""

import json
from typing import TYPE_CHECKING

import click

from camera_serve.cli.formatting import human_bytes, percent, table
from camera_serve.cli.options import json_option

if TYPE_CHECKING:
    from camera_serve.evaluation.inspection import Inspection, LayerInspection

LEAST_SEEN = 3
HEADER = ("layer", "d_ff min", "median", "max", "empty", "shared", "removed", "bits", "bytes")
BYTES_HEADER = ("layer", "bits", "min", "median", "max")
BYTES_HEADING = (
    "bits per weight of the original, of each layer and of its routed experts; its micro-experts:"
)


@click.command(short_help="Show layers, kept expert widths and bytes of a checkpoint.")
@click.argument("model", metavar="OUT")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Show what the checkpoint OUT holds: experts' kept widths, bytes, least-seen experts.

    OUT may be compressed or still dense.
    """
    from camera_serve.checkpoint.hub import resolve
    from camera_serve.evaluation.inspection import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(resolve(model))
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2))
        return
    click.echo(_summary(inspection))
    click.echo()
    if inspection.plan:
        click.echo(f"{BYTES_HEADING}\n{_bytes_table(inspection)}\n")
    click.echo(_layer_table(inspection))


def _summary(inspection: "Inspection") -> str:
    stored = inspection.stored
    published = f", published as {stored.format}" if stored else ""
    plan = inspection.plan or f"none: a dense checkpoint{published}"
    lines = (
        ("checkpoint", inspection.path),
        ("model", _model(inspection)),
        ("tier plan", plan),
        ("removed", _removed(inspection)),
        ("bytes", _sizes(inspection)),
    )
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _model(inspection: "Inspection") -> str:
    return (
        f"{inspection.model_type}, {len(inspection.layers)} of {inspection.num_layers} layers with "
        f"{inspection.num_experts} experts (top-{inspection.top_k}), d_model {inspection.d_model}, "
        f"original d_ff {inspection.d_ff}"
    )


def _removed(inspection: "Inspection") -> str:
    return (
        f"{percent(inspection.removed_share)} of the micro-experts, "
        f"{percent(inspection.removed_parameter_share)} of all parameters"
    )


def _sizes(inspection: "Inspection") -> str:
    total, experts = inspection.total_bytes, inspection.expert_bytes
    bits = f"{inspection.bits_per_weight:.2f} bits per weight, scales and zeros counted"
    sizes = f"{human_bytes(total)} in all, {human_bytes(experts)} in experts: {bits}"
    if stored := inspection.stored:
        sizes += f"; {human_bytes(stored.total_bytes)} in all as published"
    return sizes


def _layer_table(inspection: "Inspection") -> str:
    header: tuple[str, ...] = HEADER
    rows: list[tuple[object, ...]] = [_layer_row(layer) for layer in inspection.layers]
    if any(layer.tokens_per_expert is not None for layer in inspection.layers):
        header = (*header, "least seen (expert: tokens)")
        seen = [_least_seen(layer) for layer in inspection.layers]
        rows = [(*row, cell) for row, cell in zip(rows, seen, strict=True)]
    return table(header, rows)


def _bytes_table(inspection: "Inspection") -> str:
    """Where the bytes went: bits per weight of each layer and its experts, and its tiers."""
    bits = sorted({b for layer in inspection.layers for b in layer.micro_experts_at}, reverse=True)
    names = [f"{b} bit{'' if b == 1 else 's'}" if b else "removed" for b in bits]
    rows: list[tuple[object, ...]] = [
        (
            layer.layer,
            f"{layer.bits_per_original_weight:.2f}",
            *(f"{each:.2f}" for each in layer.expert_bits_range),
            *(layer.micro_experts_at.get(b, 0) for b in bits),
        )
        for layer in inspection.layers
    ]
    return table((*BYTES_HEADER, *names), rows)


def _layer_row(layer: "LayerInspection") -> tuple[object, ...]:
    low, median, high = layer.width_range
    shared = ", ".join(map(str, layer.shared_d_ff)) or "-"
    empty = layer.expert_d_ff.count(0)
    removed, size = percent(layer.removed_share), human_bytes(layer.expert_bytes)
    bits = f"{layer.bits_per_weight:.2f}"
    return (layer.layer, low, f"{median:g}", high, empty, shared, removed, bits, size)


def _least_seen(layer: "LayerInspection") -> str:
    return ", ".join(f"{expert}: {tokens}" for expert, tokens in layer.least_seen(LEAST_SEEN))
