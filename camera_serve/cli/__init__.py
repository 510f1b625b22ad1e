"""The `camera-serve` command: one file per subcommand, heavy imports only inside them."""

import os
import warnings

import click

from camera_serve.cli.analyze import analyze
from camera_serve.cli.bench import bench
from camera_serve.cli.compress import compress
from camera_serve.cli.convert import convert
from camera_serve.cli.failures import FriendlyGroup
from camera_serve.cli.inspect import inspect
from camera_serve.cli.verify import verify


@click.group(
    cls=FriendlyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="camera-serve")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Shrink a Mixture-of-Experts model micro-expert by micro-expert, and serve it in vLLM."""
    warnings.filterwarnings("ignore")
    # Read by the libraries when a command imports them: their remarks are not ours to the user.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ctx.invoked_subcommand != "bench":
        # oneDNN keeps 1024 compiled products, of 1 MB each. Experts hardly ever see the same number
        # of tokens twice, so none of them would be used again. Servers that bench starts would.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


for command in (analyze, compress, inspect, verify, convert, bench):
    main.add_command(command)
