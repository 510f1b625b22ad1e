"""The flags that several commands share, and how they become frozen settings."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pydantic import ValidationError

    from camera_serve.recipe import Recipe, Settings, TierPlan

Command = TypeVar("Command", bound=Callable[..., Any])
SettingsT = TypeVar("SettingsT", bound="Settings")

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
SOLVERS = ("gptq", "rtn")
BUDGETS = ("layer", "model")

_DECIDED_BY_RECIPE = (
    *("alpha", "calibration", "samples", "seq_len", "seed", "dtype"),
    *("align", "group_size", "solver", "keep_fp8", "budget", "refit"),
)
_BESIDE_RECIPE = (
    "is decided by the file of --recipe: change it there, or give the settings as flags without "
    "--recipe."
)
_NOTHING_PACKED = (
    "is for tiers below 16 bits, and this plan has none: drop it, or quantize with --bits or "
    "--plan."
)

CALIBRATION_FLAGS = (
    click.option(
        "--calibration",
        metavar="SOURCE",
        multiple=True,
        default=("wikitext2",),
        show_default=True,
        help="Calibration text: a .txt, .jsonl, .json, .parquet or .gz file, a folder of them, or "
        "wikitext2 or c4 from the hub (with camera-serve[hub]). Can be given several times.",
    ),
    click.option(
        "--samples", type=int, default=128, show_default=True, help="Calibration windows."
    ),
    click.option(
        "--seq-len", type=int, default=2048, show_default=True, help="Tokens in each window."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Draws the windows."),
    click.option(
        "--alpha",
        type=float,
        default=0.95,
        show_default=True,
        help="Weight of the largest coefficient against the sum in a micro-expert's energy.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="What the calibration pass computes in; auto is the model's own.",
    ),
)
RUN_FLAGS = (
    click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True),
    click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists."),
)


def _with_a_name(ctx: click.Context, option: click.Parameter, path: Path) -> Path:
    if not path.name:
        raise click.BadParameter(f"{path} cannot be an output folder: give it a name.")
    return path


output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=_with_a_name,
    help="The folder to write; it must not exist.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def with_flags(flags: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """A decorator that adds `flags` to a command, in their order."""

    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


def validated(settings: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Build settings from flag values; a bad value is a usage error that names its flag."""
    from pydantic import ValidationError

    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise click.UsageError(_by_flag(error)) from error


def calibration_values(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings `calibration`, `alpha` and `dtype` out of a command's flags."""
    calibration = {name: flags[name] for name in ("samples", "seq_len", "seed")}
    return {
        "calibration": {"source": sources_of(flags["calibration"]), **calibration},
        "alpha": flags["alpha"],
        "dtype": flags["dtype"],
    }


def sources_of(given: tuple[str, ...]) -> str | tuple[str, ...]:
    """One source as it is, several as they are."""
    return given[0] if len(given) == 1 else given


def recipe_from(ctx: click.Context) -> "Recipe":
    """The recipe a `compress` command line asks for: a file, or its flags."""
    from camera_serve.recipe import Recipe

    flags = ctx.params
    ways = ("prune", "bits", "plan", "recipe")
    given = [name for name in ways if flags[name] is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise click.UsageError(
            f"Give exactly one of --prune, --bits, --plan and --recipe; found {found}."
        )
    if given != ["bits"]:
        _refuse(ctx, ["tier_ratio"], "goes with --bits only.")
    if given == ["recipe"]:
        _refuse(ctx, _DECIDED_BY_RECIPE, _BESIDE_RECIPE)
        return Recipe.load(flags["recipe"])
    settings = ("align", "group_size", "solver", "keep_fp8", "budget", "refit")
    own = {name: flags[name] for name in settings} | {"weighted": flags["refit"]}
    plan = _plan(flags)
    if not plan.quantized:
        _refuse(ctx, ["group_size", "solver"], _NOTHING_PACKED)
    return validated(Recipe, calibration_values(flags) | {"plan": plan} | own)


def _plan(flags: dict[str, Any]) -> "TierPlan":
    from camera_serve.errors import RecipeError
    from camera_serve.recipe import TierPlan

    try:
        if flags["plan"] is not None:
            return TierPlan.parse(flags["plan"])
        if flags["bits"] is not None:
            return TierPlan.mixed(flags["bits"], flags["tier_ratio"])
        return TierPlan.prune(flags["prune"])
    except RecipeError as error:
        given = next(name for name in ("plan", "bits", "prune") if flags[name] is not None)
        raise click.BadParameter(str(error), param_hint=_flag(given)) from error


def _refuse(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Raise `UsageError` for the first of these settings that was given."""
    for name in names:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"{_flag(name)} {why}")


def _by_flag(error: "ValidationError") -> str:
    lines = [
        f"Invalid value for {_flag(str(item['loc'][-1]))}: {item['msg']}, found {item['input']!r}."
        for item in error.errors()
    ]
    return " ".join(lines)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
