"""`camera-serve convert`: a compressed checkpoint in a format other engines load."""

from pathlib import Path

import click

from camera_serve.cli.options import output_option
from camera_serve.errors import quoted


@click.command(short_help="Write a compressed checkpoint in another format.")
@click.argument("model", metavar="OUT")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(("dense",)),
    help="dense: an ordinary checkpoint, removed micro-experts as zeros.",
)
@output_option
def convert(model: str, target: str, output: Path) -> None:
    """Write the compressed checkpoint OUT as a checkpoint that any engine loads."""
    from camera_serve.checkpoint.hub import resolve
    from camera_serve.converters.dense import convert_to_dense

    convert_to_dense(resolve(model), output)
    click.echo(f"wrote {output} ({target}); next: vllm serve {quoted(output)}")
