"""What a compression did, as `camera_report.json`: versioned, and without times: it reproduces."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from camera_serve.recipe import Recipe, Settings

REPORT_FILE = "camera_report.json"

Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^(?:[^/\\\x00]*[^/\\\x00.]/)*[^/\\\x00]*[^/\\\x00.]$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LayerReport(Settings):
    """One MoE layer: kept widths per expert, tokens seen, and the share of energy that was kept.

    `rounded_experts` saw too few tokens for GPTQ: their codes are rounded to nearest.
    Of these the shared expert counts as the last: `ranked_by_energy` were to be taken apart, and
    saw too few tokens or are too wide; `unfitted_experts` keep their down vectors, as new ones that
    make up for what was removed did not suit tokens that were held back; `uncompensated_experts`
    the same for what quantizing gate and up lost.
    """

    layer: str
    expert_d_ff: tuple[Count, ...]
    shared_d_ff: tuple[Count, ...]
    tokens_per_expert: tuple[Count, ...]
    energy_kept: float
    rounded_experts: tuple[Count, ...] = ()
    unfitted_experts: tuple[Count, ...] = ()
    uncompensated_experts: tuple[Count, ...] = ()
    ranked_by_energy: tuple[Count, ...] = ()

    @property
    def unseen_experts(self) -> tuple[int, ...]:
        """Experts that no calibration token was routed to: their ranking is by index alone."""
        return tuple(e for e, tokens in enumerate(self.tokens_per_expert) if tokens == 0)


class StoredOriginal(Settings):
    """How an original that is published quantized takes fewer bytes in its files."""

    format: str
    expert_bytes: Count
    total_bytes: Count


class CompressionReport(Settings):
    """A whole compression. Shares are of micro-experts (λ) and of all bytes.

    Bytes before are those of the original's weights in 16 bits; `stored` tells what it takes in its
    files where it is published quantized.

    `sha256` is of each file that an engine reads, in hexadecimal: weights, config.json, tokenizer.
    Reports of older versions have those of weights alone, or none.
    `revision` is the commit of a `model` of the hub's. `skipped` counts what was left out of the
    calibration text, by why.
    """

    version: Literal[1] = 1
    model: str
    revision: str | None = None
    recipe: Recipe
    fingerprint: Mapping[str, str]
    expert_bytes_before: Annotated[int, Field(gt=0)]
    expert_bytes_after: Count
    total_bytes_before: Annotated[int, Field(gt=0)]
    total_bytes_after: Count
    layers: tuple[LayerReport, ...]
    stored: StoredOriginal | None = None
    sha256: Mapping[FileName, Sha256] = {}
    skipped: Mapping[str, Count] = {}

    @property
    def saved_of_experts(self) -> float:
        """Share of expert bytes saved: λ where nothing is quantized, up to alignment."""
        return 1 - self.expert_bytes_after / self.expert_bytes_before

    @property
    def saved_of_all(self) -> float:
        """Share of all bytes of the model saved."""
        return 1 - self.total_bytes_after / self.total_bytes_before
