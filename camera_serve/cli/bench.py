"""`camera-serve bench`: how fast vLLM serves a model and its compressed checkpoints."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camera_serve.cli.failures import Failure

if TYPE_CHECKING:
    from camera_serve.benchmark.report import BenchReport

FLAGS_KEY = "camera_serve.vllm_flags"
WIDTH = 120


class CommandWithVllmFlags(click.Command):
    """A command whose arguments after `--` are not its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set aside what follows `--`: click would take it for more models."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[FLAGS_KEY] = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])


def _split_modes(ctx: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    from camera_serve.benchmark.settings import MODES

    modes = tuple(mode.strip() for mode in text.split(","))
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(MODES)}.")
    return modes


def _finite(
    ctx: click.Context, option: click.Parameter, rates: tuple[float, ...]
) -> tuple[float, ...]:
    """Without what any range lets through: `inf`, and `nan`, which is beyond no bound."""
    if wrong := [rate for rate in rates if not math.isfinite(rate)]:
        raise click.BadParameter(f"{wrong[0]} is no rate.")
    return rates


@click.command(
    cls=CommandWithVllmFlags,
    short_help="Measure speed and memory of models behind `vllm serve`.",
    options_metavar="[OPTIONS]",
    epilog="What follows -- goes to vLLM: camera-serve bench MODEL OUT -- --enforce-eager",
)
@click.argument("models", metavar="MODEL [OUT]…", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="camera_bench.json",
    show_default=True,
    help="The JSON file to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace the JSON file and the plot if they exist.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Also draw output tokens/s over concurrency; needs the extra camera-serve[plots].",
)
@click.option(
    "--modes",
    default="serve,throughput,latency",
    show_default=True,
    callback=_split_modes,
    help="Which of vLLM's benchmarks to run.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16),
    show_default=True,
    help="Requests at once; may be given more than once.",
)
@click.option(
    "--request-rate",
    "request_rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    callback=_finite,
    help="Requests per second, at random times; may be given more than once.",
)
@click.option(
    "--input-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of a prompt.",
)
@click.option(
    "--output-len",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens of an answer.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    help="Requests under each load.  [default: 4 for each at once, or 30 s of them; at least 8]",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often each model is served; every other time in the opposite order.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Cores that vLLM's CPU backend computes on."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the prompts."
)
@click.pass_context
def bench(
    ctx: click.Context,
    models: tuple[str, ...],
    output: Path,
    overwrite: bool,
    plot: Path | None,
    **flags: Any,
) -> None:
    """Serve MODEL, then each OUT, and compare speed, delays and memory with MODEL's.

    All get the same flags and prompts, and take turns: A B C, then C B A.
    """
    from camera_serve.benchmark.plot import draw, require_plots
    from camera_serve.benchmark.process import VllmError
    from camera_serve.benchmark.run import bench as run
    from camera_serve.benchmark.settings import BenchSettings
    from camera_serve.checkpoint.lock import sole_writer

    settings = BenchSettings(vllm_flags=ctx.meta[FLAGS_KEY], **flags)
    if plot:
        if "serve" not in settings.modes:
            raise click.UsageError("--plot draws what --modes serve measures: add it.")
        if plot.absolute() == output.absolute():
            raise click.UsageError("--plot and --output name one file: give each its own.")
        _check_output(plot, overwrite)
        require_plots()
    _check_output(output, overwrite)
    with ExitStack() as stack:
        for file in filter(None, (output, plot)):
            stack.enter_context(sole_writer(file, "bench"))
            _check_output(file, overwrite)
        try:
            report = run(models, settings, on_step=lambda step: click.echo(step, err=True))
        except VllmError as error:
            if error.log:
                click.echo(error.log, err=True)
            raise Failure(error.message) from error
        report.write(output)
        if plot:
            draw(report, plot)
    _show(report)
    click.echo(" and ".join(f"wrote {file}" for file in (output, plot) if file))


def _check_output(output: Path, overwrite: bool) -> None:
    """Before an hour of work, not after it."""
    if output.exists() and not (overwrite and output.is_file()):
        raise Failure(f"{output} exists: name another file, or replace it with --overwrite")
    if not output.absolute().parent.is_dir():
        raise Failure(f"{output} cannot be written: there is no folder {output.parent}")


def _show(report: "BenchReport") -> None:
    from rich.console import Console

    from camera_serve.benchmark.table import model_table, serving_table

    console = Console(width=None if Console().is_terminal else WIDTH)
    if report.serving:
        console.print(serving_table(report))
    console.print(model_table(report))
