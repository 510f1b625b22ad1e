"""How unevenly energy lies in a MoE layer: measured on the reference MoE, drawn for other shapes.

    python -m bench.shapes.energy_spread [--samples 32]

The logarithm of a micro-expert's energy is taken as the mean of its expert plus a deviation of its
own, both normal; that of an expert's tokens as normal and correlated with its mean. Writes
`bench/results/energy-spread.json`.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file

from bench import reference
from camera_serve.checkpoint.reader import Checkpoint, read_json
from camera_serve.checkpoint.writer import write_json
from camera_serve.compression.analysis import AnalysisSettings, analyze
from camera_serve.ragged.layout import rank
from camera_serve.ranking.selection import LayerEnergies
from camera_serve.recipe import Calibration, Settings

RESULTS = reference.ROOT / "bench" / "results" / "energy-spread.json"
PRUNED = (20, 40, 60)
TOKENS = 2**16


class LayerSpread(Settings):
    """One layer's spread: of log energy, and of the tokens its routed experts see.

    `between_std`, `within_std`: standard deviations of log energy between experts' means and
    within experts. `shared_mean`: the shared experts' mean above the routed ones'.
    `load_variation`: standard deviation of tokens per expert over their mean; `load_correlation`:
    of log tokens with an expert's mean log energy, because what is used more has more energy.

    `kept_share_std` and `kept_work` are not used to draw: drawn layers are compared with them. By
    pruned share, the standard deviation over routed experts of the share that is left of each,
    and the share of the routed experts' work that is left.
    """

    between_std: float
    within_std: float
    shared_mean: float
    shared_std: float
    load_variation: float
    load_correlation: float
    kept_share_std: Mapping[str, float]
    kept_work: Mapping[str, float]

    @classmethod
    def of(cls, energies: LayerEnergies) -> Self:
        """Measure one layer; micro-experts of energy 0 have no logarithm and are left out."""
        logs = [_log(expert) for expert in energies.experts]
        means = torch.stack([log.mean() for log in logs])
        within = torch.cat([log - log.mean() for log in logs])
        shared, tokens = _log(energies.shared), energies.tokens.double()
        both = torch.stack([tokens.clamp(min=1).log(), means])
        return cls(
            between_std=float(means.std()),
            within_std=float(within.std()),
            shared_mean=float(shared.mean() - means.mean()),
            shared_std=float(shared.std()),
            load_variation=float(tokens.std() / tokens.mean()),
            load_correlation=float(torch.corrcoef(both)[0, 1]),
            kept_share_std={f"{p}%": float(kept_shares(energies, p).std()) for p in PRUNED},
            kept_work={f"{p}%": kept_work(energies, p) for p in PRUNED},
        )

    def draw(
        self, num_experts: int, d_ff: int, shared_d_ff: int, generator: torch.Generator
    ) -> LayerEnergies:
        """Energies and tokens of a random layer with this spread, `TOKENS` for each expert."""
        expert, other = torch.randn(2, num_experts, generator=generator, dtype=torch.float64)
        deviations = torch.randn(num_experts, d_ff, generator=generator, dtype=torch.float64)
        shared = torch.randn(shared_d_ff, generator=generator, dtype=torch.float64)
        experts = self.between_std * expert[:, None] + self.within_std * deviations
        mixed = self.load_correlation * expert + math.sqrt(1 - self.load_correlation**2) * other
        # A log-normal variable of variation v has a logarithm of variance log(1 + v²).
        loads = torch.softmax(math.sqrt(math.log1p(self.load_variation**2)) * mixed, 0)
        tokens = (TOKENS * num_experts * loads).round().long()
        shared_log = self.shared_mean + self.shared_std * shared
        return LayerEnergies(experts.exp(), shared_log.exp(), tokens)


class EnergySpread(Settings):
    """The spread in every MoE layer of a model, as `bench/results/energy-spread.json`."""

    version: Literal[1] = 1
    model: str
    calibration: Calibration
    layers: tuple[LayerSpread, ...]

    @classmethod
    def stored(cls) -> Self:
        """What `python -m bench.shapes.energy_spread` measured on the reference MoE."""
        return cls.model_validate(read_json(RESULTS))


def kept_shares(energies: LayerEnergies, percent: int) -> torch.Tensor:
    """The share of each routed expert that pruning `percent` of the layer leaves: `[experts]`."""
    order = rank(torch.cat(energies.per_expert))
    kept = torch.zeros(len(order), dtype=torch.float64)
    kept[order[: len(order) - len(order) * percent // 100]] = 1
    return kept[: energies.experts.numel()].view_as(energies.experts).mean(1)


def kept_work(energies: LayerEnergies, percent: int) -> float:
    """The share of the routed experts' work that is left: each expert counts by its tokens."""
    tokens = energies.tokens.double()
    return float((kept_shares(energies, percent) * tokens).sum() / tokens.sum())


def measure(samples: int) -> EnergySpread:
    """Analyze the reference MoE on `samples` windows and keep the spread of its energies."""
    calibration = Calibration(source=str(reference.CALIBRATION), samples=samples)
    structure = Checkpoint.open(reference.MODEL).structure
    with tempfile.TemporaryDirectory(prefix="camera-energy-spread-") as folder:
        settings = AnalysisSettings(calibration=calibration)
        analyze(reference.MODEL, Path(folder) / "analysis", settings)
        tensors = load_file(Path(folder) / "analysis" / "energies.safetensors")
    parts = [
        [tensors[f"{structure.moe_prefix(i)}.{part}"] for part in ("experts", "shared", "tokens")]
        for i in structure.moe_layers
    ]
    source = str(reference.CALIBRATION.relative_to(reference.ROOT))
    return EnergySpread(
        model=str(reference.MODEL.relative_to(reference.ROOT)),
        calibration=calibration.model_copy(update={"source": source}),
        layers=tuple(LayerSpread.of(LayerEnergies(*layer)) for layer in parts),
    )


def _log(energies: torch.Tensor) -> torch.Tensor:
    return energies[energies > 0].log()


def main() -> int:
    """Measure the reference MoE and store the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.shapes.energy_spread")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, measure(options.samples).model_dump(mode="json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
