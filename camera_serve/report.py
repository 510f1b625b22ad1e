"""What a compression did, as `camera_report.json`: versioned, and without times: it reproduces."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from camera_serve.checkpoint.reader import read_json
from camera_serve.errors import CheckpointError
from camera_serve.recipe import Recipe, Settings, describe_errors

REPORT_FILE = "camera_report.json"


class LayerReport(Settings):
    """One MoE layer: kept widths per expert, tokens seen, and the share of energy that was kept.

    `rounded_experts` saw too few tokens for GPTQ: their codes are rounded to nearest.
    """

    layer: str
    expert_d_ff: tuple[int, ...]
    shared_d_ff: tuple[int, ...]
    tokens_per_expert: tuple[int, ...]
    energy_kept: float
    rounded_experts: tuple[int, ...] = ()

    @property
    def unseen_experts(self) -> tuple[int, ...]:
        """Experts that no calibration token was routed to: their ranking is by index alone."""
        return tuple(e for e, tokens in enumerate(self.tokens_per_expert) if tokens == 0)


class CompressionReport(Settings):
    """A whole compression. Shares are of micro-experts (λ) and of all stored bytes.

    `sha256` is of each file of weights, in hexadecimal; reports of older versions have none.
    """

    version: int = 1
    model: str
    recipe: Recipe
    fingerprint: Mapping[str, str]
    expert_bytes_before: int
    expert_bytes_after: int
    total_bytes_before: int
    total_bytes_after: int
    layers: tuple[LayerReport, ...]
    sha256: Mapping[str, str] = {}

    @property
    def saved_of_experts(self) -> float:
        """Share of expert bytes saved: λ where nothing is quantized, up to alignment."""
        return 1 - self.expert_bytes_after / self.expert_bytes_before

    @property
    def saved_of_all(self) -> float:
        """Share of all bytes of the model saved."""
        return 1 - self.total_bytes_after / self.total_bytes_before


def read_report(folder: Path) -> CompressionReport | None:
    """The report in a checkpoint's folder, if there is one.

    Raises `CheckpointError` for a file that is none.
    """
    file = folder / REPORT_FILE
    if not file.exists():
        return None
    try:
        return CompressionReport.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(
            f"{file} is no report of camera-serve compress: {describe_errors(error)}; remove it, "
            "or compress the model again"
        ) from error
