"""Back to a checkpoint that any engine loads: what was removed is zero, what was packed 16 bits."""

from collections.abc import Mapping
from pathlib import Path

import torch

from camera_serve.checkpoint.experts import read_experts, read_shared_experts
from camera_serve.checkpoint.format import DENSE_TIERS, Shapes, dense_layout, expert_shapes
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.report import CONVERSION_FILE, ConversionReport
from camera_serve.checkpoint.workspace import (
    folder_identity,
    refuse_overlap,
    require_same_folder,
    whole_output,
)
from camera_serve.checkpoint.writer import (
    ShardPlan,
    copy_side_files,
    require_space,
    serving_config,
    sha256_of,
    side_files_of,
    write_index,
    write_json,
    write_shard,
)
from camera_serve.errors import CheckpointError
from camera_serve.models.storage import as_published
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.ragged.layer import RaggedLayer, dense_rows


def convert_to_dense(source: Path, output: Path) -> None:
    """Write the compressed checkpoint `source` as a dense one, one layer in memory at a time.

    An expert's kept micro-experts come first, in stored order, packed tiers as the weights they
    stand for, then zeros up to the original d_ff: a zero micro-expert adds nothing to the layer's
    output (Eq. 2). What was compressed how, and a checksum of each file, lies beside it
    for `verify` (`ConversionReport`). `output` appears whole or not at all. Raises
    `CheckpointError` for a source that is not compressed or contradicts its config, `OutputError`
    when `output` exists or cannot be written.
    """
    output = output.resolve()
    refuse_overlap(source, output)
    identity = folder_identity(source)
    checkpoint = Checkpoint.open(source)
    _check_is_compressed(checkpoint)
    shapes = _dense_expert_shapes(checkpoint)
    with whole_output(output, "convert") as folder:
        require_space(output.parent, _dense_bytes(checkpoint, shapes))
        _write(checkpoint, shapes, folder)
        require_same_folder(source, identity)


def _check_is_compressed(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is None:
        raise CheckpointError(
            f"{checkpoint.path} has no camera quantization_config: it is a dense checkpoint already"
        )


def _dense_expert_shapes(checkpoint: Checkpoint) -> dict[int, Shapes]:
    """The original expert shapes of every MoE layer, shared experts included."""
    structure = checkpoint.structure
    layout = dense_layout(structure)
    return {
        layer: expert_shapes(structure, layer, layout, DENSE_TIERS)
        for layer in structure.moe_layers
    }


def _dense_bytes(checkpoint: Checkpoint, shapes: Mapping[int, Shapes]) -> int:
    values = sum(torch.Size(shape).numel() for layer in shapes.values() for shape in layer.values())
    others = checkpoint.entries.keys() - checkpoint.expert_names
    outside = sum(checkpoint.entries[name].num_bytes for name in others)
    return outside + values * checkpoint.dtype.itemsize


def _write(checkpoint: Checkpoint, shapes: Mapping[int, Shapes], folder: Path) -> None:
    plan = ShardPlan(checkpoint)
    files: dict[str, list[str]] = {}
    total_bytes = 0
    for shard, names in enumerate(plan.shards):
        rest = [name for name in names if name not in checkpoint.expert_names]
        tensors = {name: checkpoint.get(name) for name in rest}
        if shard - 1 in shapes:
            tensors |= _dense_experts(checkpoint, shard - 1, shapes[shard - 1])
        write_shard(folder / plan.file_name(shard), tensors)
        files[plan.file_name(shard)] = list(tensors)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    copy_side_files(checkpoint.path, folder)
    write_index(folder, files, total_bytes)
    write_json(folder / "config.json", serving_config(checkpoint, None))
    _note(checkpoint, [*files, *side_files_of(folder)], folder)


def _note(checkpoint: Checkpoint, files: list[str], folder: Path) -> None:
    assert checkpoint.quantization
    noted = ConversionReport(
        recipe=checkpoint.quantization.recipe,
        bits=checkpoint.quantization.bits,
        sha256={name: sha256_of(folder / name) for name in files},
    )
    write_json(folder / CONVERSION_FILE, noted.model_dump(mode="json"))


def _dense_experts(checkpoint: Checkpoint, layer: int, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The expert tensors of one layer at their original shapes, in the form transformers loads."""
    structure = checkpoint.structure
    routed, tensors = read_experts(checkpoint, layer), {}
    for projection in PROJECTIONS:
        for expert in range(structure.num_experts):
            name = f"{structure.expert_prefix(layer, expert, projection)}.weight"
            rows = _rows(routed, expert, projection, checkpoint.dtype)
            tensors[name] = _padded(rows.T if projection == "down" else rows, shapes[name])
    if structure.shared_d_ff:
        shared = read_shared_experts(checkpoint, layer)
        for projection in PROJECTIONS:
            name = f"{structure.shared_prefix(layer, projection)}.weight"
            rows = _rows(shared, 0, projection, checkpoint.dtype)
            tensors[name] = _padded(rows.T if projection == "down" else rows, shapes[name])
    return as_published(tensors, structure, layer)


def _rows(
    layer: RaggedLayer, expert: int, projection: Projection, dtype: torch.dtype
) -> torch.Tensor:
    """One expert's rows of all tiers, `[d_ff_e, d_model]`."""
    tiers = [dense_rows(getattr(t, projection), t.rows(expert), dtype) for t in layer.tiers]
    return torch.cat([tier.to(dtype) for tier in tiers])


def _padded(kept: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    padded = torch.zeros(shape, dtype=kept.dtype)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return padded
