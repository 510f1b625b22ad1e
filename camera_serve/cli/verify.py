"""`camera-serve verify`: is a checkpoint what its config says, and what the original held."""

import json
from typing import TYPE_CHECKING

import click

from camera_serve.cli.formatting import human_bytes, percent, table
from camera_serve.cli.options import json_option
from camera_serve.cli.progress import shown_progress

if TYPE_CHECKING:
    from camera_serve.verification import LayerVerification, Verification


@click.command(short_help="Check a checkpoint against its config and the original model.")
@click.argument("model", metavar="OUT")
@click.option(
    "--against",
    metavar="MODEL",
    help="The model OUT was made from: every kept micro-expert must be one of its own.",
)
@json_option
def verify(model: str, against: str | None, as_json: bool) -> None:
    """Read every tensor of the checkpoint OUT and check it against its config.

    With --json, every dropped micro-expert is listed by its original index.
    """
    from camera_serve.checkpoint.reader import resolve
    from camera_serve.verification import verify as verify_checkpoint

    original = resolve(against) if against else None
    with shown_progress() as on_progress:
        verification = verify_checkpoint(resolve(model), original, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps(verification.to_json(), indent=2))
    else:
        click.echo(_report(verification))


def _report(verification: "Verification") -> str:
    checked = (
        f"OK: {verification.num_tensors} tensors ({human_bytes(verification.total_bytes)}) have "
        "the names and shapes config.json implies, and every weight is finite"
    )
    if verification.against is None:
        return checked
    header = ("layer", "dropped", "of", "share", "empty experts")
    rows = [_row(layer) for layer in verification.layers]
    equal = (
        f"OK: every kept micro-expert is one of {verification.against}, none is kept twice, and "
        "every other tensor is byte-equal"
    )
    return f"{checked}\n{equal}\n\n{table(header, rows)}"


def _row(layer: "LayerVerification") -> tuple[object, ...]:
    dropped, original = layer.num_dropped, layer.original_micro_experts
    return (layer.layer, dropped, original, percent(dropped / original), len(layer.emptied))
