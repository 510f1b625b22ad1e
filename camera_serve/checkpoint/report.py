"""What a compression did, as `camera_report.json`: versioned, and without times: it reproduces."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from camera_serve.recipe import Recipe, Settings

REPORT_FILE = "camera_report.json"
CONVERSION_FILE = "camera_conversion.json"

Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^(?:[^/\\\x00]*[^/\\\x00.]/)*[^/\\\x00]*[^/\\\x00.]$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_LATER = (
    *("uncompensated_experts", "unpolished_experts", "ranked_by_energy"),
    *("predicted_error", "output_error"),
)


class LayerReport(Settings):
    """One MoE layer: kept widths per expert, tokens seen, and the share of energy that was kept.

    Where a survey says how many stay of each expert and the compressed layers' tokens which,
    `energy_kept` is of the survey's choice.

    `rounded_experts` saw too few tokens for GPTQ: their codes are rounded to nearest.
    Of these the shared expert counts as the last: `ranked_by_energy` were to be taken apart, and
    saw too few tokens or are too wide; `unfitted_experts` keep their down vectors, as new ones that
    make up for what was removed did not suit tokens that were held back; `uncompensated_experts`
    the same for what quantizing gate and up lost; `unpolished_experts` keep the codes of GPTQ for
    the same reason.

    `predicted_error` is the share of the layer's energy, Σ_j Σφ_j² ‖w_j‖² over all calibration
    tokens of the dense model, that a survey expects to be lost: Σ_j E_j ρ(b_j) / Σ_j E_j, or what
    removal costs. `output_error` is what was lost, ‖y - ŷ‖² of what all experts of the layer add to
    a token over the same energy, on the last eighth of the tokens, 4096 at most: down is not fitted
    to them, GPTQ has seen them. Recipes that neither survey nor fit have neither.
    """

    layer: str
    expert_d_ff: tuple[Count, ...]
    shared_d_ff: tuple[Count, ...]
    tokens_per_expert: tuple[Count, ...]
    energy_kept: float
    rounded_experts: tuple[Count, ...] = ()
    unfitted_experts: tuple[Count, ...] = ()
    uncompensated_experts: tuple[Count, ...] = ()
    unpolished_experts: tuple[Count, ...] = ()
    ranked_by_energy: tuple[Count, ...] = ()
    predicted_error: float | None = None
    output_error: float | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_known(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        # The published algorithm's report is as older versions wrote it.
        report: dict[str, Any] = serialize(self)
        return {k: v for k, v in report.items() if k not in _LATER or v not in (None, [], ())}

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


class ConversionReport(Settings):
    """What a dense checkpoint was made from, as `camera_conversion.json` beside it.

    recipe, bits: of the compressed checkpoint and its stored tiers. They tell what of the experts
    is still the original's: fitted down vectors and packed micro-experts are not. `sha256`: as in
    `CompressionReport`.
    """

    version: Literal[1] = 1
    recipe: Recipe
    bits: tuple[int, ...]
    sha256: Mapping[FileName, Sha256]
