"""The frozen settings of one compression: the CLI builds them, the checkpoint carries them."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from camera_serve.errors import RecipeError

SERVED_BITS = (16, 8, 4, 3, 2, 1, 0)
"""Bit-widths that can be stored and served; 0 is pruning, 16 the weights as they are."""


class Settings(BaseModel):
    """Frozen, strict settings: an unknown key is an error, not a typo that passes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tier(Settings):
    """A bit-width and the share of a layer's micro-experts that have it."""

    bits: int
    fraction: Annotated[float, Field(gt=0, le=1)]


class TierPlan(Settings):
    """Tiers from the most important: `16:0.6,0:0.4` is CAMERA-P at λ = 40%."""

    tiers: tuple[Tier, ...]

    @classmethod
    def prune(cls, fraction: float) -> Self:
        """CAMERA-P: keep `1 - fraction` of each layer's micro-experts (Algorithm 2, line 9)."""
        if not 0 < fraction < 1:
            raise RecipeError(
                f"--prune is {fraction}: the share to remove must be in (0, 1), such as 0.4 for 40%"
            )
        return cls(tiers=(Tier(bits=16, fraction=1 - fraction), Tier(bits=0, fraction=fraction)))

    @classmethod
    def mixed(cls, bits: int, ratio: float) -> Self:
        """CAMERA-Q: `[b+1, b, b-1]` bits in shares `[r, 1-2r, r]` (appendix A.5)."""
        _check_neighbours(bits)
        if not 0 < ratio <= 0.5:
            raise RecipeError(f"--tier-ratio is {ratio}: the share must be in (0, 0.5]")
        shares = {bits + 1: ratio, bits: 1 - 2 * ratio, bits - 1: ratio}
        return cls.parse(",".join(f"{b}:{share!r}" for b, share in shares.items() if share))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`16:0.6,0:0.4` as a plan; raises `RecipeError` that shows what was read."""
        try:
            pairs = [part.split(":") for part in text.split(",")]
            tiers = tuple(Tier(bits=int(bits), fraction=float(share)) for bits, share in pairs)
            return cls(tiers=tiers)
        except ValidationError as error:
            raise RecipeError(f"plan {text!r}: {describe_errors(error)}") from error
        except ValueError as error:
            raise RecipeError(
                f"plan {text!r} is not a list of BITS:SHARE, such as 16:0.6,0:0.4"
            ) from error

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bits = [tier.bits for tier in self.tiers]
        unknown = [b for b in bits if b not in SERVED_BITS]
        if unknown:
            raise ValueError(f"{unknown[0]} bits cannot be served; use bits from {SERVED_BITS}")
        if bits != sorted(set(bits), reverse=True):
            raise ValueError(f"bits must fall from tier to tier, found {bits}")
        total = math.fsum(tier.fraction for tier in self.tiers)
        if not math.isclose(total, 1, abs_tol=1e-9):
            raise ValueError(f"fractions must sum to 1, found {total:g}")
        if bits == [0]:
            raise ValueError("this plan prunes whole layers; keep a tier above 0 bits")
        return self

    @property
    def bits(self) -> tuple[int, ...]:
        """The stored bit-widths, most important first; pruning stores nothing."""
        return tuple(tier.bits for tier in self.tiers if tier.bits)

    @property
    def quantized(self) -> tuple[int, ...]:
        """The stored bit-widths that are packed: all but 16."""
        return tuple(b for b in self.bits if b < 16)

    @property
    def pruned(self) -> float:
        """λ: the share of a MoE layer's micro-experts that is removed."""
        return sum(tier.fraction for tier in self.tiers if tier.bits == 0)

    def __str__(self) -> str:
        """The plan as `parse` reads it."""
        return ",".join(f"{tier.bits}:{tier.fraction:.12g}" for tier in self.tiers)


class Calibration(Settings):
    """The text energies are measured on: `samples` windows of `seq_len` tokens (section 4.2).

    source: a file, a folder or a data set's name, or several of them.
    """

    source: str | tuple[str, ...]
    samples: Annotated[int, Field(gt=0)] = 128
    seq_len: Annotated[int, Field(gt=1)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources, in order."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def name(self) -> str:
        """The sources in words."""
        return ", ".join(self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return self.samples * self.seq_len


GOALS = ("plan", "bits_per_weight", "size")
"""The settings that say what to keep: a recipe has one of them."""

PAPER: dict[str, Any] = {
    "budget": "layer",
    "elimination": False,
    "weighted": False,
    "refit": False,
    "polish": False,
    "sweeps": 0,
}
"""Algorithms 1 to 3 to the letter: what recipes of versions 1 and 2 mean, which know no more."""


class Recipe(Settings):
    """Everything that decides the bytes of a compressed checkpoint, besides the model itself.

    What to keep is said by one of `plan`, the tiers and their shares, `bits_per_weight`, what the
    experts take on average of the original's weights, scales and zeros counted, and `size`, bytes
    of all tensors. The last two leave the choice among the bit-widths `allow` to the ranking.

    `budget`: whose micro-experts a plan's shares are of, each layer's or the whole model's.
    `elimination`: what removal costs once the others make up for it decides what is removed, not
    energies. `weighted`: tokens count in GPTQ's Hessians by the square of their routing weight.
    `refit`: kept down vectors are fitted to what was removed, and to what gate and up lost.
    `polish`: scales, zeros and codes are fitted once more after GPTQ. `sweeps`: how often down is
    fitted to what the whole layer still lacks. `keep_fp8`: weights outside the experts stay in FP8
    where the original has them so.

    Version 1 drew other windows of calibration texts above 1.5 million characters; of shorter ones
    the same. Versions 1 and 2 leave out what `PAPER` says. `alpha` is of energies that rank without
    a survey, as the paper's do.
    """

    version: Literal[1, 2, 3] = 3
    plan: TierPlan | None = None
    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    allow: tuple[int, ...] = SERVED_BITS
    calibration: Calibration
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    align: Annotated[int, Field(gt=0)] = 32
    group_size: Annotated[int, Field(gt=0)] = 128
    solver: Literal["gptq", "rtn"] = "gptq"
    budget: Literal["layer", "model"] = "model"
    elimination: bool = True
    weighted: bool = True
    refit: bool = True
    polish: bool = True
    sweeps: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    keep_fp8: bool = False

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """The paper's own: energies with α, a share of every layer, nothing fitted."""
        return cls(version=2, **settings)

    @field_validator("allow")
    @classmethod
    def _served(cls, allow: tuple[int, ...]) -> tuple[int, ...]:
        if allow != tuple(b for b in SERVED_BITS if b in allow) or not any(allow):
            raise ValueError(
                f"wanted falling bit-widths out of {', '.join(map(str, SERVED_BITS))}, one of them "
                "above 0"
            )
        return allow

    @model_validator(mode="before")
    @classmethod
    def _as_older_versions_meant_it(cls, settings: Any) -> Any:
        older = isinstance(settings, dict) and settings.get("version") in (1, 2)
        return PAPER | settings if older else settings

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if len(goals) != 1:
            found = " and ".join(goals) or "none"
            raise ValueError(f"wanted exactly one of {', '.join(GOALS)}, found {found}")
        if self.sweeps and self.packed:
            raise ValueError("sweeps are for pruning alone: set sweeps to 0, or keep 16 bits")
        if self.sweeps and not self.refit:
            raise ValueError("sweeps begin with what a refit has found: set refit to true")
        if self.plan is None and self.budget == "layer":
            raise ValueError(f"{goals[0]} is a budget of the whole model: set budget to model")
        return self

    @property
    def bits(self) -> tuple[int, ...]:
        """The bit-widths that may be stored, most important first."""
        return self.plan.bits if self.plan else tuple(b for b in self.allow if b)

    @property
    def packed(self) -> tuple[int, ...]:
        """The bit-widths below 16 that may be stored."""
        return tuple(b for b in self.bits if b < 16)

    @property
    def removes(self) -> bool:
        """Whether micro-experts may be removed."""
        return bool(self.plan.pruned) if self.plan else 0 in self.allow

    @property
    def eliminates(self) -> bool:
        """Whether what is removed is decided by elimination: nothing else is to be decided."""
        return self.elimination and self.bits == (16,)

    @property
    def surveys(self) -> bool:
        """Whether a pass over the dense model comes first."""
        return self.budget == "model" or self.eliminates

    @property
    def polishes(self) -> bool:
        """Whether codes are polished: those of GPTQ are."""
        return self.polish and self.solver == "gptq"

    @property
    def goal(self) -> str:
        """What is to be kept, in a few words: the plan as `TierPlan.parse` reads it, or a size."""
        if self.plan:
            return str(self.plan)
        allowed = f"of {', '.join(map(str, self.allow))} bits"
        if self.size is not None:
            return f"{self.size} bytes, {allowed}"
        return f"{self.bits_per_weight:g} bits per weight, {allowed}"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a recipe from YAML; raises `RecipeError` that names the setting at fault."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            settings = data.keys() if isinstance(data, dict) else ()
            if 2 * len(cls.model_fields.keys() & settings) < max(len(settings), 1):
                raise RecipeError(
                    f"recipe {path} is none: it holds other settings than those of a run; give the "
                    "camera_recipe.yaml of an earlier one"
                )
            return cls.model_validate(data)
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise RecipeError(f"recipe {path}: {describe_errors(error)}") from error
        # A ValueError is bytes that are no UTF-8, or a date that is none.
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"recipe {path} is not YAML: {error}") from error

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Older versions of camera-serve read what they know, so it stays theirs.
        settings: dict[str, Any] = serialize(self)
        unused: dict[str, Any] = dict.fromkeys(GOALS) | {"keep_fp8": False}
        if self.plan:
            unused["allow"] = settings["allow"]
        if self.version < 3:
            unused |= PAPER
        return {
            key: value
            for key, value in settings.items()
            if key not in unused or value != unused[key]
        }

    def dump(self) -> str:
        """The recipe as YAML, as `load` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _check_neighbours(bits: int) -> None:
    """Refuse an average whose neighbours are not served, with a plan that has the same average."""
    if {bits + 1, bits, bits - 1} <= set(SERVED_BITS):
        return
    if not 0 < bits < 16:
        raise RecipeError(f"--bits is {bits}: give 1, 2 or 3, or another average by --plan")
    above = min(b for b in SERVED_BITS if b > bits)
    below = max(b for b in SERVED_BITS if b < bits)
    if bits in SERVED_BITS:
        high, low = 0.1, 0.1 * (above - bits) / (bits - below)
        plan = f"{above}:{high:g},{bits}:{1 - high - low:g},{below}:{low:g}"
    else:
        high = (bits - below) / (above - below)
        plan = f"{above}:{high:g},{below}:{1 - high:g}"
    raise RecipeError(
        f"--bits {bits} means tiers of {bits + 1}, {bits} and {bits - 1} bits, and only "
        f"{', '.join(map(str, SERVED_BITS))} are served: for an average of {bits} bits give "
        f"--plan {plan}"
    )


def describe_errors(error: ValidationError) -> str:
    """A pydantic error as one line: `calibration.samples: Input should be greater than 0`."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)
