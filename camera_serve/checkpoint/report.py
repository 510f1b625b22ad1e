"""What a compression did, as `camera_report.json`: versioned, and without times: it reproduces."""

from collections.abc import Mapping

from camera_serve.recipe import Recipe, Settings

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
    `skipped` counts what was left out of the calibration text, by why.
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
    skipped: Mapping[str, int] = {}

    @property
    def saved_of_experts(self) -> float:
        """Share of expert bytes saved: λ where nothing is quantized, up to alignment."""
        return 1 - self.expert_bytes_after / self.expert_bytes_before

    @property
    def saved_of_all(self) -> float:
        """Share of all bytes of the model saved."""
        return 1 - self.total_bytes_after / self.total_bytes_before
