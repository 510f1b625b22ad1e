"""`camera-serve verify`: is a checkpoint what its config says, and what the original held."""

import json
from typing import TYPE_CHECKING

import click

from camera_serve.cli.failures import Failure
from camera_serve.cli.formatting import human_bytes, percent, table
from camera_serve.cli.options import json_option, refuse_given, sources_of, validated
from camera_serve.cli.progress import shown_progress

if TYPE_CHECKING:
    from pathlib import Path

    from camera_serve.evaluation.verification import LayerVerification, Verification
    from camera_serve.recipe import Calibration

WRONG = 2.0
"""Relative output error that no compression makes: a layer without experts is off by 1."""


@click.command(short_help="Check a checkpoint against its config and the original model.")
@click.argument("model", metavar="OUT")
@click.option(
    "--against",
    metavar="MODEL",
    help="The model OUT was made from: kept 16-bit micro-experts must be its own, to the bit; of "
    "fitted ones, gate and up.",
)
@click.option(
    "--calibration",
    metavar="SOURCE",
    multiple=True,
    help="With --against: also compare the output of every MoE layer on this text.",
)
@click.option("--samples", type=int, default=8, show_default=True, help="Windows of that text.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens in a window.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    model: str,
    against: str | None,
    calibration: tuple[str, ...],
    samples: int,
    seq_len: int,
    as_json: bool,
) -> None:
    """Read every tensor of the checkpoint OUT and check it against its config.

    With --json, every dropped micro-expert is listed by its original index.
    """
    from camera_serve.checkpoint.hub import resolve
    from camera_serve.evaluation.verification import verify as verify_checkpoint
    from camera_serve.recipe import Calibration

    if calibration and not against:
        raise click.UsageError("--calibration compares with the original: give --against MODEL.")
    if not calibration:
        refuse_given(ctx, ("samples", "seq_len"), "is of --calibration SOURCE: give both.")
    source = sources_of(calibration) if calibration else "none"
    settings = {"source": source, "samples": samples, "seq_len": seq_len}
    text = validated(Calibration, settings)
    path, original = resolve(model), resolve(against) if against else None
    with shown_progress() as on_progress:
        verification = verify_checkpoint(path, original, on_progress=on_progress)
    errors: dict[int, float] = {}
    if calibration and original:
        errors = _output_errors(path, original, text)
    if as_json:
        output_errors = {"output_errors": errors} if errors else {}
        click.echo(json.dumps(verification.to_json() | output_errors, indent=2))
    else:
        click.echo(_report(verification, compared_outputs=bool(errors)))
        if errors:
            rows: list[tuple[object, ...]] = [(n, percent(e)) for n, e in errors.items()]
            click.echo("\n" + table(("layer", "output error"), rows))
    _refuse_wrong_outputs(errors)


def _refuse_wrong_outputs(errors: dict[int, float]) -> None:
    # Written so that NaN is refused too.
    if wrong := [layer for layer, error in errors.items() if not error < WRONG]:
        raise Failure(
            f"layer {wrong[0]} is off by {percent(errors[wrong[0]])} of its output, and a layer "
            "without experts would be off by 100%: these are not the original's; compress it again"
        )


def _output_errors(model: "Path", original: "Path", text: "Calibration") -> dict[int, float]:
    import torch

    from camera_serve.checkpoint.reader import Checkpoint
    from camera_serve.evaluation.fidelity import output_errors

    pair = (Checkpoint.open(original), Checkpoint.open(model))
    with shown_progress() as on_progress:
        return output_errors(*pair, text, device=torch.device("cpu"), on_progress=on_progress)


def _report(verification: "Verification", *, compared_outputs: bool) -> str:
    checked = (
        f"OK: {verification.num_tensors} tensors ({human_bytes(verification.total_bytes)}) have "
        "the names and shapes config.json implies, and every weight is finite"
    )
    if verification.num_checksums:
        others = (
            f" and {verification.num_side_checksums} more that engines read, config.json first,"
        )
        checked += (
            f"\nOK: {verification.num_checksums} files of weights"
            f"{others if verification.num_side_checksums else ''} are, by their SHA-256, those "
            f"that {verification.written_by} wrote"
        )
    elif verification.compressed:
        checked += f"\nno checksum was compared: {_without_checksums(verification.path)}"
    if verification.against is None:
        return checked
    if verification.packed:
        how = "below" if compared_outputs else "with --calibration TEXT"
        return (
            f"{checked}\nOK: every tensor outside the experts is byte-equal; packed micro-experts "
            f"are compared by what they put out, {how}"
        )
    kept, fitted = "every kept micro-expert is one", ""
    if verification.refitted:
        kept = "gate and up of every kept micro-expert are those of one"
        fitted = "; down vectors were fitted anew"
    header = ("layer", "dropped", "of", "share", "empty experts")
    rows = [_row(layer) for layer in verification.layers]
    equal = (
        f"OK: {kept} of {verification.against}, none is kept twice, and every other tensor is "
        f"byte-equal{fitted}"
    )
    return f"{checked}\n{equal}\n\n{table(header, rows)}"


def _without_checksums(path: "Path") -> str:
    from camera_serve.checkpoint.report import REPORT_FILE

    if not (path / REPORT_FILE).exists():
        return (
            f"{path} has no {REPORT_FILE}, which compress wrote with the SHA-256 of every file; "
            "changed weights and added files are not found without it"
        )
    return f"{REPORT_FILE} is of an older version, which noted none"


def _row(layer: "LayerVerification") -> tuple[object, ...]:
    dropped, original = layer.num_dropped, layer.original_micro_experts
    return (layer.layer, dropped, original, percent(dropped / original), len(layer.emptied))
