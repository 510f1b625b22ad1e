"""compress(): Algorithm 2, layer by layer, each on the outputs of those compressed before it."""

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from camera_serve.calibration.documents import HUB_SETS
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.card import model_card
from camera_serve.checkpoint.files import LOG_FILE, RECIPE_FILE
from camera_serve.checkpoint.format import (
    MARKER,
    MARKER_FILE,
    CameraQuantizationConfig,
    LayerCounts,
    OutsideExperts,
)
from camera_serve.checkpoint.hub import origin_of, resolve
from camera_serve.checkpoint.kept import kept_in_fp8, saved_bytes, stored_parts, weights_of
from camera_serve.checkpoint.lock import sole_writer
from camera_serve.checkpoint.notes import notes
from camera_serve.checkpoint.reader import Checkpoint, read_json
from camera_serve.checkpoint.report import REPORT_FILE, CompressionReport, LayerReport
from camera_serve.checkpoint.workspace import Workspace, check_output, refuse_overlap
from camera_serve.checkpoint.writer import (
    STATE,
    ShardPlan,
    copy_side_files,
    require_space,
    serving_config,
    sha256_of,
    side_files_of,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from camera_serve.compression.fingerprint import explain, fingerprint, part_of_survey
from camera_serve.compression.layer import CompressedLayer, compress_layer
from camera_serve.compression.losses import layers_to_measure, measure_losses
from camera_serve.compression.sizing import (
    Estimate,
    allocate,
    allocation_for,
    check_fits,
    disk_bytes,
    estimate_for,
)
from camera_serve.compression.stored_analysis import StoredAnalysis
from camera_serve.errors import DamagedWeightsError, OutputError, RecipeError
from camera_serve.models.building import auto_class_name
from camera_serve.progress import OnNote, OnProgress, Reporter
from camera_serve.ranking.gram import WIDEST
from camera_serve.ranking.selection import Selection
from camera_serve.ranking.survey import LayerSurvey, survey_layer, surveyed_share
from camera_serve.recipe import Recipe, Settings
from camera_serve.runtime import compute_dtype, pick_device, run_log

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What stays the same from layer to layer of one compression."""

    checkpoint: Checkpoint
    recipe: Recipe
    stream: ModelStream
    workspace: Workspace
    shards: ShardPlan
    skipped: Mapping[str, int]
    kept: OutsideExperts | None


def estimate(
    model: str | Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    analysis: Path | None = None,
    on_note: OnNote = lambda note: None,
) -> Estimate:
    """What `compress` would write, hold and take, without writing anything.

    Local calibration text is looked at: too little raises `CalibrationError`. None is downloaded.
    `on_note` is told what `compress` would tell of the model. `analysis`: as of `compress`; what a
    size gives the micro-experts is then known.
    """
    source = resolve(str(model))
    checkpoint = _opened(source, on_note)
    check_fits(checkpoint, recipe)
    stored = _given(analysis, recipe)
    local = HUB_SETS.keys().isdisjoint(recipe.calibration.sources)
    tokens = windows_for(checkpoint, recipe.calibration).tokens if local else None
    target, allocation = pick_device(device), None
    if stored:
        dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
        stored.require(part_of_survey(fingerprint(checkpoint, recipe, tokens, target, dtype)))
        surveys = stored.surveys(checkpoint.structure)
        allocation = allocation_for(checkpoint, recipe, [*surveys.values()])
    return estimate_for(checkpoint, recipe, target, allocation)


def _given(analysis: Path | None, recipe: Recipe) -> StoredAnalysis | None:
    """The analysis to begin with, if any; raises `RecipeError` where there is nothing to begin."""
    if analysis is None:
        return None
    if not recipe.surveys:
        raise RecipeError(
            "--analysis stands for a pass over the whole model, which a recipe with budget layer "
            "and without elimination (such as --paper) does not make: leave out --analysis"
        )
    found = StoredAnalysis.open(Path(analysis))
    found.require_text(recipe.calibration)
    return found


def compress(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    analysis: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote = lambda note: None,
) -> CompressionReport:
    """Compress a MoE model into a checkpoint that `vllm serve` loads.

    model: a local folder, or what the hub calls it (`ModelName.parse`). The output appears by
    rename when it is complete; the finished layers of an interrupted run stay in `OUTPUT.partial`
    and `resume` continues it to the same bytes. One run writes an output at a time; `on_note` is
    told what `resume` did not find, and what there is to know of the model
    (`camera_serve.checkpoint.notes`). `analysis`: a folder that `analyze` wrote of the same model
    and calibration text, in place of a pass over the dense model.
    Raises `CameraError` subclasses for everything a user can set right.
    """
    source = resolve(str(model))
    output = Path(output).resolve()
    refuse_overlap(source, output)
    checkpoint = _opened(source, on_note)
    check_fits(checkpoint, recipe)
    stored = _given(analysis, recipe)
    kept = kept_in_fp8(checkpoint) if recipe.keep_fp8 else None
    target = pick_device(device)
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    with sole_writer(output, "compress"):
        windows = windows_for(checkpoint, recipe.calibration)
        print_ = fingerprint(checkpoint, recipe, windows.tokens, target, dtype)
        if stored:
            stored.require(part_of_survey(print_))
            # For its errors, before anything is written; what it holds is read when it is used.
            stored.surveys(checkpoint.structure)
        if resume and (done := _finished(output, print_, overwrite=overwrite)):
            on_note(f"nothing to resume: {output} is finished already")
            return done
        check_output(output, overwrite=overwrite)
        workspace = Workspace(output)
        written = workspace.bytes_written if resume else 0
        require_space(output.parent, disk_bytes(checkpoint, recipe) - written)
        goes_on = resume and _continued(workspace, print_, overwrite=overwrite, on_note=on_note)
        if not goes_on:
            workspace.create(overwrite=overwrite)
        with workspace.kept_for_resuming():
            if not goes_on:
                workspace.record(print_)
            stream, shards = ModelStream(checkpoint, target, dtype), ShardPlan(checkpoint)
            run = _Run(checkpoint, recipe, stream, workspace, shards, windows.skipped, kept)
            reporter = partial(Reporter, checkpoint.structure.num_layers, target, on_progress)
            try:
                with run_log(workspace.path / LOG_FILE):
                    logger.info("compress %s to %s: %s", model, output, recipe.model_dump_json())
                    # Layers that are compressed already went by the survey that there is.
                    if stored and workspace.layers_surveyed < checkpoint.structure.num_layers:
                        _take_survey(run, stored)
                    selections = _survey_layers(run, windows.tokens, reporter())
                    _compress_layers(run, windows.tokens, selections, reporter())
                    bits = next(iter(selections.values())).bits if selections else recipe.bits
                    report = _write_rest(run, bits, print_)
                    logger.info("expert weights: %.1f%% smaller", 100 * report.saved_of_experts)
            except DamagedWeightsError:
                # The model fails again at the same tensor: there is nothing to resume.
                workspace.discard()
                raise
        workspace.publish(overwrite=overwrite)
    return report


def _opened(source: Path, on_note: OnNote) -> Checkpoint:
    """An original that is to be compressed."""
    checkpoint = Checkpoint.open(source)
    checkpoint.require_dense()
    for note in notes(checkpoint):
        on_note(f"note: {note}")
    return checkpoint


def _continued(
    workspace: Workspace, wanted: dict[str, str], *, overwrite: bool, on_note: OnNote
) -> bool:
    """Whether there is an interrupted run to continue.

    Raises `OutputError` for one with other inputs that is not to be overwritten.
    """
    begun = workspace.begun()
    if begun is None:
        on_note(f"nothing to resume: {workspace.path} holds no interrupted run; starting anew")
        return False
    if changed := explain(begun.fingerprint, wanted):
        since = f" at {begun.since}" if begun.since else ""
        found = f"{workspace.path} was begun{since} {changed}"
        if overwrite:
            on_note(f"nothing to resume: {found}; starting anew")
            return False
        raise OutputError(
            f"{found}; resume it with the inputs of that run, start over with --overwrite, or "
            "choose another output"
        )
    return True


def _finished(output: Path, wanted: dict[str, str], *, overwrite: bool) -> CompressionReport | None:
    """The report of an output that is there already.

    Raises `OutputError` for one made from other inputs that is not to be overwritten.
    """
    if not (output / REPORT_FILE).exists():
        return None
    try:
        report = CompressionReport.model_validate(read_json(output / REPORT_FILE))
    except ValidationError as error:
        raise OutputError(
            f"{output} holds a {REPORT_FILE} of another kind: choose another output"
        ) from error
    if changed := explain(report.fingerprint, wanted):
        if overwrite:
            return None
        raise OutputError(
            f"{output} was made {changed}; choose another output, or replace it with --overwrite, "
            "beside --resume to continue an interrupted run"
        )
    shutil.rmtree(output / STATE, ignore_errors=True)
    return report


class LayerResult(Settings):
    """What one finished layer adds to the checkpoint; `counts` and `report` are its MoE part.

    `sha256` is of its file.
    """

    names: tuple[str, ...]
    sha256: str = ""
    expert_bytes: int = 0
    counts: LayerCounts | None = None
    report: LayerReport | None = None


def _survey_layers(run: _Run, tokens: torch.Tensor, report: Reporter) -> dict[int, Selection]:
    """What is to be kept of each MoE layer, from a pass over the dense model."""
    if not run.recipe.surveys:
        return {}
    structure = run.checkpoint.structure
    if run.workspace.layers_surveyed < structure.num_layers:
        share = surveyed_share(structure, run.recipe)
        _run_dense(run, tokens[: math.ceil(share * len(tokens))], report)
    surveys = [LayerSurvey.of(run.workspace.survey(layer)) for layer in structure.moe_layers]
    selections = allocate(run.checkpoint, run.recipe, surveys)
    return dict(zip(structure.moe_layers, selections, strict=True))


def _take_survey(run: _Run, stored: StoredAnalysis) -> None:
    """Leave nothing to survey: a run that is resumed without the analysis goes on as well."""
    logger.info("survey: that of %s", stored.path)
    structure = run.checkpoint.structure
    found = {layer: own.tensors() for layer, own in stored.surveys(structure).items()}
    run.workspace.take_survey(found, structure.num_layers)


def _run_dense(run: _Run, tokens: torch.Tensor, report: Reporter) -> None:
    """Survey the layers that are not surveyed yet, each on the output of the dense one before."""
    start, hidden = run.workspace.survey_point()
    hidden = run.stream.embed(tokens) if hidden is None else hidden
    report("survey", start)
    structure = run.checkpoint.structure
    measured = layers_to_measure(structure.moe_layers, structure.num_experts, run.recipe)
    measure = partial(measure_losses, recipe=run.recipe, device=run.stream.device)
    widest = WIDEST if run.recipe.eliminates else 0
    layers = range(start, structure.num_layers)
    with run.stream.loading(layers) as load:
        for layer in layers:
            loaded, found = load(), {}
            if loaded.experts is None:
                hidden = run.stream.run(layer, loaded, hidden)
            else:
                losses_of = measure if layer in measured else None
                found = survey_layer(run.stream, layer, loaded, hidden, widest, losses_of).tensors()
            del loaded
            # After the last one nothing goes on from there.
            following = hidden if layer + 1 < structure.num_layers else hidden[:0]
            run.workspace.commit_survey(layer, found, following)
            report("survey", layer + 1)


def _compress_layers(
    run: _Run, tokens: torch.Tensor, selections: Mapping[int, Selection], report: Reporter
) -> None:
    start, hidden = run.workspace.resume_point()
    hidden = run.stream.embed(tokens) if hidden is None else hidden
    report("compress", start)
    layers = range(start, run.checkpoint.structure.num_layers)
    with run.stream.loading(layers) as load:
        for layer in layers:
            hidden = _compress_layer(run, layer, load(), hidden, selections.get(layer))
            report("compress", layer + 1)


def _compress_layer(
    run: _Run,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    selection: Selection | None,
) -> torch.Tensor:
    """Algorithm 2 and 3, the body of the loop; returns the input of the next layer."""
    names = run.shards.shards[layer + 1]
    if loaded.experts is None:
        tensors = _read(run, names)
        result = LayerResult(names=tuple(tensors))
    else:
        compressed = compress_layer(run.stream, layer, loaded, hidden, run.recipe, selection)
        loaded = compressed.loaded
        rest = [name for name in names if name not in run.checkpoint.expert_names]
        tensors = _read(run, rest) | compressed.tensors
        result = _layer_result(run.checkpoint.structure.moe_prefix(layer), tensors, compressed)
    result = result.model_copy(update={"sha256": _write(run, layer + 1, tensors)})
    output = run.stream.run(layer, loaded, hidden)
    run.workspace.commit(layer, result.model_dump(mode="json"), output)
    return output


def _write(run: _Run, shard: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write one shard of the checkpoint; its SHA-256."""
    file = run.workspace.path / run.shards.file_name(shard)
    write_shard(file, tensors)
    return sha256_of(file)


def _read(run: _Run, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors outside the experts, as they are written."""
    checkpoint, kept = run.checkpoint, weights_of(run.kept)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if run.kept and name in kept:
            tensors |= stored_parts(checkpoint, name, run.kept)
        else:
            tensors[name] = checkpoint.get(name)
    checkpoint.release()
    return tensors


def _layer_result(
    name: str, tensors: Mapping[str, torch.Tensor], compressed: CompressedLayer
) -> LayerResult:
    layout = compressed.selection.layout
    report = LayerReport(
        layer=name,
        expert_d_ff=layout.expert_d_ff,
        shared_d_ff=layout.shared_d_ff,
        tokens_per_expert=tuple(compressed.tokens.tolist()),
        energy_kept=compressed.selection.energy_kept,
        predicted_error=compressed.selection.predicted_error,
        output_error=compressed.output_error,
        rounded_experts=compressed.rounded,
        unfitted_experts=compressed.unfitted,
        uncompensated_experts=compressed.uncompensated,
        unpolished_experts=compressed.unpolished,
        ranked_by_energy=compressed.selection.by_energy,
    )
    logger.info(
        "%s: kept %d micro-experts, %.1f%% of the energy",
        name,
        sum(layout.expert_d_ff) + sum(layout.shared_d_ff),
        100 * report.energy_kept,
    )
    _warn_unseen(report)
    return LayerResult(
        names=tuple(tensors),
        expert_bytes=sum(tensor.nbytes for tensor in compressed.tensors.values()),
        counts=LayerCounts(experts=layout.experts, shared=layout.shared),
        report=report,
    )


def _warn_unseen(report: LayerReport) -> None:
    if report.unseen_experts:
        logger.warning(
            "%s: no calibration token reached experts %s; they are ranked last. Use more "
            "calibration text if they matter",
            report.layer,
            list(report.unseen_experts),
        )


def _write_rest(run: _Run, bits: tuple[int, ...], print_: dict[str, str]) -> CompressionReport:
    """Everything but the layers: the other shards, side files, index, card, config, report last.

    bits: of the stored tiers.
    """
    checkpoint, folder, shards = run.checkpoint, run.workspace.path, run.shards
    num_layers = checkpoint.structure.num_layers
    results = [LayerResult.model_validate(r) for r in run.workspace.results(num_layers)]
    names = [shards.shards[0], *(list(result.names) for result in results)]
    names += shards.shards[num_layers + 1 :]
    # Layers that an older version has finished are without one.
    sha256 = {
        shard: result.sha256 or sha256_of(folder / shards.file_name(shard))
        for shard, result in enumerate(results, start=1)
    }
    for shard in (0, *range(num_layers + 1, len(names))):
        sha256[shard] = _write(run, shard, _read(run, names[shard]))
    copy_side_files(checkpoint.path, folder)
    files = {shards.file_name(shard): held for shard, held in enumerate(names)}
    by_file = {file: sha256[shard] for shard, file in enumerate(files)}
    report = _report(run, print_, results)
    write_index(folder, files, report.total_bytes_after)
    write_text(folder / RECIPE_FILE, run.recipe.dump())
    auto_class = auto_class_name(checkpoint.config)
    write_text(folder / "README.md", model_card(checkpoint.path, report, auto_class))
    quantization = CameraQuantizationConfig(
        bits=bits,
        group_size=run.recipe.group_size,
        layers={r.report.layer: r.counts for r in results if r.report and r.counts},
        recipe=run.recipe,
        outside_experts=run.kept,
    )
    write_json(folder / MARKER_FILE, MARKER)
    write_json(folder / "config.json", serving_config(checkpoint, quantization))
    checksums = by_file | {name: sha256_of(folder / name) for name in side_files_of(folder)}
    report = report.model_copy(update={"sha256": checksums})
    write_json(folder / REPORT_FILE, report.model_dump(mode="json"))
    return report


def _report(run: _Run, print_: dict[str, str], results: list[LayerResult]) -> CompressionReport:
    origin = origin_of(run.checkpoint.path)
    before, after = run.checkpoint, sum(result.expert_bytes for result in results)
    written = [name for shard in run.shards.shards for name in shard]
    stored = sum(before.entries[name].num_bytes for name in written) - saved_bytes(before, run.kept)
    return CompressionReport(
        model=origin.name,
        revision=origin.revision,
        recipe=run.recipe,
        fingerprint=print_,
        skipped=run.skipped,
        expert_bytes_before=before.expert_bytes,
        expert_bytes_after=after,
        total_bytes_before=before.total_bytes,
        total_bytes_after=stored - before.expert_bytes + after,
        layers=tuple(result.report for result in results if result.report),
        stored=before.stored,
    )
