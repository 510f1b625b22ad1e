"""analyze(): CAMERA's ranking of every MoE layer, without changing the model (Algorithm 1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.hub import origin_of, resolve
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.workspace import check_output, refuse_overlap, whole_output
from camera_serve.checkpoint.writer import write_json, write_shard
from camera_serve.progress import OnProgress, Reporter
from camera_serve.ragged.layout import rank
from camera_serve.ranking.layer import run_measured
from camera_serve.ranking.selection import LayerEnergies
from camera_serve.recipe import Calibration, Settings
from camera_serve.runtime import compute_dtype, pick_device


class AnalysisSettings(Settings):
    """What decides a ranking: the calibration text, α of Eq. 11, and the dtype computed in."""

    calibration: Calibration
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class LayerSummary(Settings):
    """One MoE layer's energies in figures; shares are of the layer's total energy.

    `expert_shares` are the routed experts' shares, `shared_share` the shared experts'.
    `energy_below` maps a pruned share of micro-experts to the share of energy that goes with it.
    """

    layer: str
    tokens_per_expert: tuple[int, ...]
    expert_shares: tuple[float, ...]
    shared_share: float
    energy_below: Mapping[str, float]


class AnalysisReport(Settings):
    """The analysis of a whole model, as `camera_analysis.json`.

    `revision` is the commit of a `model` of the hub's. `skipped` counts what was left out of the
    calibration text, by why.
    """

    version: int = 1
    model: str
    revision: str | None = None
    settings: AnalysisSettings
    skipped: Mapping[str, int] = {}
    layers: tuple[LayerSummary, ...]


def analyze(
    model: str | Path,
    output: Path,
    settings: AnalysisSettings,
    *,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> AnalysisReport:
    """Rank all micro-experts of every MoE layer of a dense model.

    Writes `energies.safetensors` (per layer `<layer>.experts` float64 `[num_experts, d_ff]`,
    `.shared` `[shared_d_ff]`, `.tokens` int64 `[num_experts]`, and `.ranking` int64
    `[num_micro_experts]`: indices into experts then shared, by falling energy) and
    `camera_analysis.json`. The folder appears by rename.
    """
    source, output = resolve(str(model)), Path(output).resolve()
    refuse_overlap(source, output)
    check_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(source)
    checkpoint.require_dense()
    target, origin = pick_device(device), origin_of(source)
    with whole_output(output, "analyze", overwrite=overwrite) as folder:
        windows = windows_for(checkpoint, settings.calibration)
        stream = ModelStream(checkpoint, target, compute_dtype(settings.dtype, checkpoint.dtype))
        energies = _all_energies(stream, windows.tokens, settings.alpha, on_progress)
        report = AnalysisReport(
            model=origin.name,
            revision=origin.revision,
            settings=settings,
            skipped=windows.skipped,
            layers=tuple(_summary(name, layer) for name, layer in energies.items()),
        )
        _write(folder, energies, report)
    return report


def _all_energies(
    stream: ModelStream, tokens: torch.Tensor, alpha: float, on_progress: OnProgress | None
) -> dict[str, LayerEnergies]:
    num_layers = stream.structure.num_layers
    progress = Reporter(num_layers, stream.device, on_progress)
    hidden = stream.embed(tokens)
    energies: dict[str, LayerEnergies] = {}
    progress("analyze", 0)
    with stream.loading(range(num_layers)) as load:
        for layer in range(num_layers):
            found, hidden = _layer_energies(stream, layer, load(), hidden, alpha)
            if found is not None:
                energies[stream.structure.moe_prefix(layer)] = found
            progress("analyze", layer + 1)
    return energies


def _layer_energies(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor, alpha: float
) -> tuple[LayerEnergies | None, torch.Tensor]:
    """A layer's energies, None where it is dense, and its output."""
    if loaded.experts is None:
        return None, stream.run(layer, loaded, hidden)
    return run_measured(stream, layer, loaded, hidden, alpha).energies, hidden


def _summary(name: str, energies: LayerEnergies) -> LayerSummary:
    every = torch.cat(energies.per_expert)
    total = float(every.sum()) or 1.0
    rising = every.sort().values.cumsum(0) / total
    shares = energies.experts.sum(1) / total
    return LayerSummary(
        layer=name,
        tokens_per_expert=tuple(energies.tokens.tolist()),
        expert_shares=tuple(shares.tolist()),
        shared_share=float(energies.shared.sum()) / total,
        energy_below={
            f"{percent}%": float(rising[len(every) * percent // 100 - 1])
            for percent in (20, 40, 60)
        },
    )


def _write(folder: Path, energies: dict[str, LayerEnergies], report: AnalysisReport) -> None:
    tensors = {}
    for name, layer in energies.items():
        tensors[f"{name}.experts"] = layer.experts
        tensors[f"{name}.shared"] = layer.shared
        tensors[f"{name}.tokens"] = layer.tokens
        tensors[f"{name}.ranking"] = rank(torch.cat(layer.per_expert))
    write_shard(folder / "energies.safetensors", tensors)
    write_json(folder / "camera_analysis.json", report.model_dump(mode="json"))
