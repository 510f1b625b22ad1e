"""An analysis that compressions begin with in place of a pass of their own, checked before use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from camera_serve.calibration.documents import HUB_SETS
from camera_serve.checkpoint.reader import read_json
from camera_serve.checkpoint.writer import sha256_of
from camera_serve.compression.analysis import (
    ANALYSIS_FILE,
    SURVEY_FILE,
    VERSION,
    AnalysisReport,
)
from camera_serve.compression.fingerprint import explain
from camera_serve.errors import AnalysisError, CalibrationError, CheckpointError, first_line
from camera_serve.models import MoeStructure
from camera_serve.ranking.survey import LayerSurvey
from camera_serve.recipe import Calibration, describe_errors

_AGAIN = "run camera-serve analyze again"


@dataclass(frozen=True)
class StoredAnalysis:
    """A folder that `analyze` wrote, and its report."""

    path: Path
    report: AnalysisReport

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the report alone; raises `AnalysisError` for a folder without a survey."""
        file = path / ANALYSIS_FILE
        if not file.is_file():
            fault = f"holds no {ANALYSIS_FILE}" if path.is_dir() else "is no folder"
            raise AnalysisError(f"{path} {fault}: give a folder that camera-serve analyze wrote")
        try:
            found = read_json(file)
        except CheckpointError as error:
            raise AnalysisError(f"{error}; {_AGAIN}") from error
        version = found.get("version")
        if version == 1:
            raise AnalysisError(f"{file} is of version 1, which has no survey: {_AGAIN}")
        if isinstance(version, int) and version > VERSION:
            raise AnalysisError(
                f"{file} is of version {version}, and this camera-serve reads {VERSION}: use a "
                f"newer camera-serve, or {_AGAIN}"
            )
        try:
            return cls(path, AnalysisReport.model_validate(found))
        except ValidationError as error:
            faults = describe_errors(error)
            raise AnalysisError(
                f"{file} is no report of an analysis: {faults}; {_AGAIN}"
            ) from error

    def require_text(self, calibration: Calibration) -> None:
        """Refuse a text that is gone: what is kept is fitted to it, layer by layer."""
        for source in calibration.sources:
            if source not in HUB_SETS and not Path(source).exists():
                raise CalibrationError(
                    f"calibration source {source} does not exist, and compress needs the text that "
                    f"{self.path} was made on: put it back, or say with --calibration where it is"
                )

    def require(self, inputs: Mapping[str, str]) -> None:
        """Refuse an analysis of other inputs than these, parts of a fingerprint of a survey."""
        known = {part: self.report.fingerprint.get(part, "unset") for part in inputs}
        files = {p: found for p, found in self.report.fingerprint.items() if p.startswith("file ")}
        if changed := explain(known | files, inputs):
            raise AnalysisError(
                f"{self.path} was made {changed}; compress with the inputs of that analysis, "
                f"{_AGAIN}, or leave out --analysis"
            )

    def surveys(self, structure: MoeStructure) -> dict[int, LayerSurvey]:
        """What was found of each MoE layer; raises `AnalysisError` for the first that is wrong."""
        file = self.path / SURVEY_FILE
        try:
            stored = load_file(file)
        except (SafetensorError, OSError) as error:
            raise AnalysisError(
                f"{file} is missing, truncated or damaged ({first_line(error)}): {_AGAIN}"
            ) from error
        found = {layer: _survey(file, stored, structure, layer) for layer in structure.moe_layers}
        if (digest := sha256_of(file)) != self.report.survey_sha256:
            wanted = self.report.survey_sha256[:16] or "none"
            raise AnalysisError(
                f"{file} is damaged: its SHA-256 begins {digest[:16]}, {ANALYSIS_FILE} has "
                f"{wanted}: {_AGAIN}"
            )
        return found


def _survey(
    file: Path, stored: Mapping[str, torch.Tensor], structure: MoeStructure, layer: int
) -> LayerSurvey:
    name = structure.moe_prefix(layer)
    parts = {}
    for part, (shape, dtype) in _parts(structure).items():
        if (found := stored.get(f"{name}.{part}")) is None:
            layers = [key for key in stored if key.endswith(f".{part}")]
            raise AnalysisError(
                f"{file} lacks {name}.{part}: it has {part} of {len(layers)} layers, the model has "
                f"{len(structure.moe_layers)} MoE layers: {_AGAIN}"
            )
        if (tuple(found.shape), found.dtype) != (shape, dtype):
            raise AnalysisError(
                f"{file}: {name}.{part} is {_described(found.dtype, found.shape)}, wanted "
                f"{_described(dtype, shape)}: {_AGAIN}"
            )
        parts[part] = found
    for part in ("experts", "shared", "weight", "costs", "norms"):
        if bad := int((~parts[part].isfinite()).sum()):
            raise AnalysisError(
                f"{file}: {bad} of {parts[part].numel()} values of {name}.{part} are NaN or Inf: "
                f"{_AGAIN}"
            )
    survey = LayerSurvey.of(parts)
    for expert, order in enumerate(survey.order):
        if not order.sort().values.equal(torch.arange(len(order))):
            raise AnalysisError(
                f"{file}: {name}.order does not name each of the {len(order)} micro-experts of "
                f"expert {expert} once: {_AGAIN}"
            )
    return survey


def _parts(structure: MoeStructure) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of `LayerSurvey.tensors` where no losses were measured."""
    experts, every = structure.num_experts, (structure.micro_experts_per_layer,)
    return {
        "experts": ((experts, structure.d_ff), torch.float64),
        "shared": ((structure.shared_d_ff,), torch.float64),
        "tokens": ((experts,), torch.int64),
        "weight": ((), torch.float64),
        "order": (every, torch.int64),
        "costs": (every, torch.float64),
        "norms": (every, torch.float64),
        "apart": ((experts + bool(structure.shared_d_ff),), torch.bool),
    }


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
