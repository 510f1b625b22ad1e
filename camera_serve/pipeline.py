"""compress(): Algorithm 2, layer by layer, each on the outputs of those compressed before it."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from camera_serve.calibration import calibration_tokens
from camera_serve.checkpoint.card import model_card
from camera_serve.checkpoint.format import (
    MARKER,
    MARKER_FILE,
    CameraQuantizationConfig,
    LayerCounts,
)
from camera_serve.checkpoint.reader import DTYPES, Checkpoint, read_json, resolve
from camera_serve.checkpoint.workspace import Workspace, differences, refuse_overlap
from camera_serve.checkpoint.writer import (
    ShardPlan,
    copy_side_files,
    require_space,
    serving_config,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from camera_serve.errors import CheckpointError, OutputError
from camera_serve.fingerprint import fingerprint
from camera_serve.models.structure import PROJECTIONS
from camera_serve.progress import OnProgress, Reporter
from camera_serve.ranking import LayerEnergies, Selection, measure, select
from camera_serve.recipe import Recipe, Settings
from camera_serve.report import CompressionReport, LayerReport
from camera_serve.runtime import compute_dtype, pick_device, run_log
from camera_serve.sizing import Estimate, estimate_for
from camera_serve.streaming import (
    ModelStream,
    RoutedExperts,
    StreamedLayer,
    select_rows,
    select_shared,
)

logger = logging.getLogger(__name__)


_KeptRows = tuple[int, torch.Tensor]
"""The dimension of a tensor that micro-experts lie along, and which of them to keep."""


@dataclass(frozen=True)
class _Run:
    """What stays the same from layer to layer of one compression."""

    checkpoint: Checkpoint
    recipe: Recipe
    stream: ModelStream
    workspace: Workspace
    shards: ShardPlan


def estimate(model: str | Path, recipe: Recipe, *, device: str = "auto") -> Estimate:
    """What `compress` would write, hold and take, without writing anything."""
    checkpoint = Checkpoint.open(resolve(str(model)))
    checkpoint.require_dense()
    return estimate_for(checkpoint, recipe, pick_device(device))


def compress(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> CompressionReport:
    """Compress a MoE model into a checkpoint that `vllm serve` loads.

    model: a local folder or a hub name. The output appears by rename when it is complete; an
    interrupted run stays in `OUTPUT.partial` and `resume` continues it to the same bytes.
    Raises `CameraError` subclasses for everything a user can set right.
    """
    source = resolve(str(model))
    output = Path(output)
    refuse_overlap(source, output)
    checkpoint = Checkpoint.open(source)
    checkpoint.require_dense()
    target = pick_device(device)
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    tokens = calibration_tokens(recipe.calibration, source)
    print_ = fingerprint(checkpoint, recipe, tokens, target, dtype)
    if resume and (done := _finished(output, print_)):
        return done
    require_space(output.parent, estimate_for(checkpoint, recipe, target).disk_bytes)
    workspace = Workspace(output)
    workspace.start(print_, resume=resume, overwrite=overwrite)
    stream = ModelStream(checkpoint, target, dtype)
    run = _Run(checkpoint, recipe, stream, workspace, ShardPlan(checkpoint))
    reporter = Reporter(checkpoint.structure.num_layers, target, on_progress)
    try:
        with run_log(workspace.path / "camera.log"):
            _compress_layers(run, tokens, reporter)
            report = _write_rest(run, str(model), print_)
    except CheckpointError:
        # A damaged model fails again at the same tensor: there is nothing to resume.
        workspace.discard()
        raise
    workspace.publish()
    return report


def _finished(output: Path, wanted: dict[str, str]) -> CompressionReport | None:
    if not (output / "camera_report.json").exists():
        return None
    try:
        report = CompressionReport.model_validate(read_json(output / "camera_report.json"))
    except ValidationError as error:
        raise OutputError(
            f"{output} holds a camera_report.json of another kind: choose another output"
        ) from error
    if changed := differences(report.fingerprint, wanted):
        raise OutputError(
            f"{output} is finished, by another run: {changed}; choose another output, or "
            "replace it with --overwrite"
        )
    shutil.rmtree(output / ".state", ignore_errors=True)
    return report


class LayerResult(Settings):
    """What one finished layer adds to the checkpoint; `counts` and `report` are its MoE part."""

    names: tuple[str, ...]
    counts: LayerCounts | None = None
    report: LayerReport | None = None


def _compress_layers(run: _Run, tokens: torch.Tensor, report: Reporter) -> None:
    start, hidden = run.workspace.resume_point()
    hidden = run.stream.embed(tokens) if hidden is None else hidden
    report("compress", start)
    for layer in range(start, run.checkpoint.structure.num_layers):
        hidden = _compress_layer(run, layer, hidden)
        report("compress", layer + 1)


def _compress_layer(run: _Run, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """Algorithm 2, lines 4-15, for one layer; returns the input of the next."""
    loaded = run.stream.load(layer)
    kept: dict[str, _KeptRows] = {}
    counts = report = None
    if loaded.experts is not None:
        energies = measure(run.stream, layer, loaded, hidden, run.recipe.alpha)
        selection = select(energies, run.recipe.plan, run.recipe.align)
        kept = _kept_rows(run.checkpoint, layer, selection)
        loaded = _narrow(loaded, selection)
        counts = LayerCounts(experts=selection.layout.experts, shared=selection.layout.shared)
        report = _layer_report(run.checkpoint.structure.moe_prefix(layer), energies, selection)
        _warn_unseen(report)
    tensors = _read(run.checkpoint, run.shards.shards[layer + 1], kept)
    write_shard(run.workspace.path / run.shards.file_name(layer + 1), tensors)
    result = LayerResult(names=tuple(tensors), counts=counts, report=report)
    output = run.stream.run(layer, loaded, hidden)
    run.workspace.commit(layer, result.model_dump(mode="json"), output)
    return output


def _kept_rows(checkpoint: Checkpoint, layer: int, selection: Selection) -> dict[str, _KeptRows]:
    structure = checkpoint.structure
    kept: dict[str, _KeptRows] = {}
    for projection in PROJECTIONS:
        dim = int(projection == "down")
        for expert, rows in enumerate(selection.experts):
            kept[f"{structure.expert_prefix(layer, expert, projection)}.weight"] = (dim, rows)
        for rows in selection.shared:
            kept[f"{structure.shared_prefix(layer, projection)}.weight"] = (dim, rows)
    return kept


def _read(
    checkpoint: Checkpoint, names: list[str], kept: dict[str, _KeptRows]
) -> dict[str, torch.Tensor]:
    """The tensors of one shard, as stored, narrowed where `kept` says so; empty ones left out."""
    tensors = {}
    for name in names:
        tensor = checkpoint.get(name)
        if name in kept:
            dim, rows = kept[name]
            tensor = tensor.index_select(dim, rows)
        if tensor.numel():
            tensors[name] = tensor
    checkpoint.release()
    return tensors


def _narrow(loaded: StreamedLayer, selection: Selection) -> StreamedLayer:
    assert loaded.experts is not None
    experts = select_rows(loaded.experts, selection.experts)
    loaded.use_experts(RoutedExperts(experts))
    if loaded.shared is not None:
        select_shared(loaded.shared, selection.shared[0])
    return replace(loaded, experts=experts)


def _layer_report(name: str, energies: LayerEnergies, selection: Selection) -> LayerReport:
    return LayerReport(
        layer=name,
        expert_d_ff=selection.layout.expert_d_ff,
        shared_d_ff=selection.layout.shared_d_ff,
        tokens_per_expert=tuple(energies.tokens.tolist()),
        energy_kept=selection.energy_kept,
    )


def _warn_unseen(report: LayerReport) -> None:
    if report.unseen_experts:
        logger.warning(
            "%s: no calibration token reached experts %s; they are pruned first. Use more "
            "calibration text if they matter",
            report.layer,
            list(report.unseen_experts),
        )


def _write_rest(run: _Run, model: str, print_: dict[str, str]) -> CompressionReport:
    """Everything but the layers: the other shards, side files, index, report, card, config last."""
    checkpoint, folder, shards = run.checkpoint, run.workspace.path, run.shards
    num_layers = checkpoint.structure.num_layers
    results = [LayerResult.model_validate(r) for r in run.workspace.results(num_layers)]
    names = [shards.shards[0], *(list(result.names) for result in results)]
    names += shards.shards[num_layers + 1 :]
    for shard in (0, *range(num_layers + 1, len(names))):
        write_shard(folder / shards.file_name(shard), _read(checkpoint, names[shard], {}))
    copy_side_files(checkpoint.path, folder)
    files = {shards.file_name(shard): held for shard, held in enumerate(names)}
    report = _report(run, model, print_, results)
    write_index(folder, files, report.total_bytes_after)
    write_json(folder / "camera_report.json", report.model_dump(mode="json"))
    write_text(folder / "camera_recipe.yaml", run.recipe.dump())
    write_text(folder / "README.md", model_card(checkpoint.path, report))
    quantization = CameraQuantizationConfig(
        bits=run.recipe.plan.bits,
        layers={r.report.layer: r.counts for r in results if r.report and r.counts},
        recipe=run.recipe,
    )
    write_json(folder / MARKER_FILE, MARKER)
    write_json(folder / "config.json", serving_config(checkpoint, quantization))
    return report


def _report(
    run: _Run, model: str, print_: dict[str, str], results: list[LayerResult]
) -> CompressionReport:
    before, dropped = run.checkpoint, _dropped_bytes(run.checkpoint, results)
    stored = sum(before.entries[name].num_bytes for shard in run.shards.shards for name in shard)
    return CompressionReport(
        model=model if not Path(model).is_dir() else Path(model).resolve().name,
        recipe=run.recipe,
        fingerprint=print_,
        expert_bytes_before=before.expert_bytes,
        expert_bytes_after=before.expert_bytes - dropped,
        total_bytes_before=before.total_bytes,
        total_bytes_after=stored - dropped,
        layers=tuple(result.report for result in results if result.report),
    )


def _dropped_bytes(checkpoint: Checkpoint, results: list[LayerResult]) -> int:
    """Bytes of all pruned micro-experts: each is three vectors of d_model weights."""
    structure = checkpoint.structure
    dropped = 0
    for layer, result in enumerate(results):
        if result.report is None:
            continue
        name = f"{structure.expert_prefix(layer, 0, 'gate')}.weight"
        per_weight = DTYPES[checkpoint.entries[name].dtype].itemsize
        kept = sum(result.report.expert_d_ff) + sum(result.report.shared_d_ff)
        rows = structure.micro_experts_per_layer - kept
        dropped += rows * len(PROJECTIONS) * structure.d_model * per_weight
    return dropped
