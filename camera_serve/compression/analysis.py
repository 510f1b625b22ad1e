"""analyze(): CAMERA's ranking of every MoE layer, and the survey that compressions begin with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from camera_serve.calibration.streaming import ModelStream
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.hub import origin_of, resolve
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.workspace import check_output, refuse_overlap, whole_output
from camera_serve.checkpoint.writer import sha256_of, write_json, write_shard
from camera_serve.compression.fingerprint import fingerprint_of_survey
from camera_serve.progress import OnProgress, Reporter
from camera_serve.ragged.layout import rank
from camera_serve.ranking.selection import LayerEnergies
from camera_serve.ranking.survey import LayerSurvey, analyze_layer
from camera_serve.recipe import Calibration, Settings
from camera_serve.runtime import compute_dtype, pick_device

ANALYSIS_FILE = "camera_analysis.json"
SURVEY_FILE = "survey.safetensors"
VERSION = 2
"""Of the folder: version 1 has no survey."""


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
    calibration text, by why. `fingerprint` is of all that the survey depends on, `survey_sha256` of
    its file; version 1 has neither.
    """

    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    model: str
    revision: str | None = None
    settings: AnalysisSettings
    skipped: Mapping[str, int] = {}
    fingerprint: Mapping[str, str] = {}
    survey_sha256: str = ""
    layers: tuple[LayerSummary, ...]


@dataclass(frozen=True)
class _Analyzed:
    """What a pass over the model has found of one MoE layer."""

    energies: LayerEnergies
    survey: LayerSurvey


def analyze(
    model: str | Path,
    output: Path,
    settings: AnalysisSettings,
    *,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> AnalysisReport:
    """Rank all micro-experts of every MoE layer of a dense model, and survey them.

    Writes `energies.safetensors` (per layer `<layer>.experts` float64 `[num_experts, d_ff]`,
    `.shared` `[shared_d_ff]`, `.tokens` int64 `[num_experts]`, and `.ranking` int64
    `[num_micro_experts]`: indices into experts then shared, by falling energy),
    `survey.safetensors` (per layer `<layer>.` and the names of `LayerSurvey.tensors`), which
    `compress` takes in place of a pass of its own, and `camera_analysis.json`. The folder appears
    by rename.
    """
    source, output = resolve(str(model)), Path(output).resolve()
    refuse_overlap(source, output)
    check_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(source)
    checkpoint.require_dense()
    target, origin = pick_device(device), origin_of(source)
    dtype = compute_dtype(settings.dtype, checkpoint.dtype)
    with whole_output(output, "analyze", overwrite=overwrite) as folder:
        windows = windows_for(checkpoint, settings.calibration)
        calibration, tokens = settings.calibration, windows.tokens
        print_ = fingerprint_of_survey(checkpoint, calibration, tokens, target, dtype)
        stream = ModelStream(checkpoint, target, dtype)
        layers = _all_layers(stream, tokens, settings.alpha, on_progress)
        _write_tensors(folder, layers)
        report = AnalysisReport(
            model=origin.name,
            revision=origin.revision,
            settings=settings,
            skipped=windows.skipped,
            fingerprint=print_,
            survey_sha256=sha256_of(folder / SURVEY_FILE),
            layers=tuple(_summary(name, layer.energies) for name, layer in layers.items()),
        )
        write_json(folder / ANALYSIS_FILE, report.model_dump(mode="json"))
    return report


def _all_layers(
    stream: ModelStream, tokens: torch.Tensor, alpha: float, on_progress: OnProgress | None
) -> dict[str, _Analyzed]:
    num_layers = stream.structure.num_layers
    progress = Reporter(num_layers, stream.device, on_progress)
    hidden = stream.embed(tokens)
    layers: dict[str, _Analyzed] = {}
    progress("analyze", 0)
    with stream.loading(range(num_layers)) as load:
        for layer in range(num_layers):
            loaded = load()
            if loaded.experts is None:
                hidden = stream.run(layer, loaded, hidden)
            else:
                found = analyze_layer(stream, layer, loaded, hidden, alpha)
                layers[stream.structure.moe_prefix(layer)] = _Analyzed(*found)
            del loaded
            progress("analyze", layer + 1)
    return layers


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


def _write_tensors(folder: Path, layers: Mapping[str, _Analyzed]) -> None:
    energies: dict[str, torch.Tensor] = {}
    surveys: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        own = layer.energies
        energies[f"{name}.experts"] = own.experts
        energies[f"{name}.shared"] = own.shared
        energies[f"{name}.tokens"] = own.tokens
        energies[f"{name}.ranking"] = rank(torch.cat(own.per_expert))
        surveys |= {f"{name}.{part}": found for part, found in layer.survey.tensors().items()}
    write_shard(folder / "energies.safetensors", energies)
    write_shard(folder / SURVEY_FILE, surveys)
