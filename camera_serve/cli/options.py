"""The flags that several commands share, and how they become frozen settings."""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
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
GOALS = ("prune", "bits", "plan", "bits_per_weight", "size", "recipe")

_DECIDED_BY_RECIPE = (
    *("alpha", "calibration", "samples", "seq_len", "seed", "dtype"),
    *("align", "group_size", "solver", "keep_fp8", "budget", "sweeps", "paper", "allow"),
)
_BESIDE_RECIPE = (
    "is decided by the file of --recipe: change it there, or give the settings as flags without "
    "--recipe."
)
_NOTHING_PACKED = (
    "is for tiers below 16 bits, and this plan has none: drop it, or quantize with --bits, --plan "
    "or --bits-per-weight."
)
_OF_THE_PAPER = (
    "does not go with --paper, which has a share of every layer and fits nothing: drop one."
)
_NOT_THE_PAPER = (
    "stands for a pass over the whole model, and --paper makes none: it ranks each layer as it "
    "comes to it. Drop one."
)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

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
    from camera_serve.recipe import PAPER, Recipe

    flags = ctx.params
    given = [name for name in GOALS if flags[name] is not None]
    if len(given) != 1:
        found = " and ".join(map(_flag, given)) or "none"
        wanted = ", ".join(map(_flag, GOALS[:-1]))
        raise click.UsageError(f"Give exactly one of {wanted} and --recipe; found {found}.")
    if given != ["bits"]:
        refuse_given(ctx, ["tier_ratio"], "goes with --bits only.")
    if given == ["recipe"]:
        refuse_given(ctx, _DECIDED_BY_RECIPE, _BESIDE_RECIPE)
        return Recipe.load(flags["recipe"])
    settings = ("align", "group_size", "solver", "keep_fp8", "budget", "sweeps")
    own = {name: flags[name] for name in settings} | _goal(ctx, given[0])
    if flags["paper"]:
        refuse_given(ctx, ("budget", "sweeps", "bits_per_weight", "size"), _OF_THE_PAPER)
        refuse_given(ctx, ("analysis",), _NOT_THE_PAPER)
        own |= {"version": 2} | PAPER
    if flags["analysis"] is not None:
        flags = flags | _as_analyzed(ctx, flags["analysis"])
    recipe = validated(Recipe, calibration_values(flags) | own)
    if recipe.surveys:
        refuse_given(ctx, ["alpha"], "is of the paper's ranking: it goes with --paper.")
    if not recipe.packed:
        refuse_given(ctx, ["group_size", "solver"], _NOTHING_PACKED)
    return recipe


def _as_analyzed(ctx: click.Context, analysis: Path) -> dict[str, Any]:
    """The calibration flags that are not given, as an analysis had them."""
    from camera_serve.compression.stored_analysis import StoredAnalysis

    settings = StoredAnalysis.open(analysis).report.settings
    had: dict[str, Any] = {"calibration": settings.calibration.sources}
    had |= settings.calibration.model_dump(exclude={"source"}) | {"dtype": settings.dtype}
    return {name: value for name, value in had.items() if not _is_given(ctx, name)}


def _goal(ctx: click.Context, given: str) -> dict[str, Any]:
    """What to keep, as settings of a recipe."""
    if given in ("bits_per_weight", "size"):
        if ctx.params["budget"] == "layer":
            raise click.UsageError(f"{_flag(given)} is of the whole model: drop --budget layer.")
        return {given: ctx.params[given], "allow": ctx.params["allow"]}
    refuse_given(
        ctx, ["allow"], "goes with --bits-per-weight and --size only: a plan has its own bits."
    )
    return {"plan": _plan(ctx.params)}


class SizeType(click.ParamType):
    """Bytes as people write them: 12GB, 11.5GiB, or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, as an int."""
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)", str(value).strip())
        unit = _UNITS.get(match[2].lower()) if match else None
        if not match or unit is None or not (size := int(Fraction(match[1]) * unit)):
            self.fail(f"{value!r} is no size: give one like 12GB, 11.5GiB or 12000000000", param)
        return size


class BitsType(click.ParamType):
    """Bit-widths with commas between them."""

    name = "bits"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The bit-widths, falling."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({int(part) for part in value.split(",")}, reverse=True))
        except ValueError:
            self.fail(f"{value!r} are no bit-widths: give some like 4,3,2,0", param)


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


def refuse_given(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Raise `UsageError` for the first of these settings that was given."""
    for name in names:
        if _is_given(ctx, name):
            raise click.UsageError(f"{_flag(name)} {why}")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _by_flag(error: "ValidationError") -> str:
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        if item["loc"]:
            flag = _flag(str(item["loc"][-1]))
            lines.append(f"Invalid value for {flag}: {message}, found {item['input']!r}.")
        else:
            lines.append(f"{message[:1].upper()}{message[1:]}.")
    return " ".join(lines)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
