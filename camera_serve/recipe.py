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


_LATER = ("budget", "weighted", "refit", "keep_fp8")
"""Settings that older versions do not know: they are written where they are used."""


class Recipe(Settings):
    """Everything that decides the bytes of a compressed checkpoint, besides the model itself.

    Version 1 drew other windows of calibration texts above 1.5 million characters; of shorter ones
    the same. `keep_fp8`: weights outside the experts stay in FP8 where the original has them so.
    `budget`: whose micro-experts the plan's shares are of, each layer's or the whole model's, which
    takes a pass over the dense model first; `weighted`: tokens count in GPTQ's Hessians by the
    square of their routing weight; `refit`: kept down vectors are fitted to what was removed, and
    to what gate and up lost.
    """

    version: Literal[1, 2] = 2
    plan: TierPlan
    calibration: Calibration
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    align: Annotated[int, Field(gt=0)] = 32
    group_size: Annotated[int, Field(gt=0)] = 128
    solver: Literal["gptq", "rtn"] = "gptq"
    budget: Literal["layer", "model"] = "layer"
    weighted: bool = False
    refit: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    keep_fp8: bool = False

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a recipe from YAML; raises `RecipeError` that names the setting at fault."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise RecipeError(f"recipe {path}: {describe_errors(error)}") from error
        # A ValueError is bytes that are no UTF-8, or a date that is none.
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"recipe {path} is not YAML: {error}") from error

    @model_serializer(mode="wrap")
    def _as_older_versions_read_it(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        settings: dict[str, Any] = serialize(self)
        fields = type(self).model_fields
        unused = {key for key in _LATER if getattr(self, key) == fields[key].default}
        return {key: value for key, value in settings.items() if key not in unused}

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
