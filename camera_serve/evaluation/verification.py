"""Is a checkpoint what its config says, and are its micro-experts those of the original model?"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camera_serve.checkpoint.format import dense_layout
from camera_serve.checkpoint.kept import stored_parts, weights_of
from camera_serve.checkpoint.reader import Checkpoint, read_conversion
from camera_serve.checkpoint.writer import is_left_behind, serving_config
from camera_serve.errors import CheckpointError
from camera_serve.evaluation.checksums import Checksums
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.progress import OnProgress, Reporter

ExpertNames = dict[Projection, str]


@dataclass(frozen=True)
class LayerVerification:
    """Which micro-experts of the original one MoE layer lacks, by rising original index.

    `experts[e]` and `shared[s]` index into the expert's original d_ff; `emptied` are the routed
    experts that kept nothing.
    """

    layer: int
    experts: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...]
    emptied: tuple[int, ...]
    original_micro_experts: int

    @property
    def num_dropped(self) -> int:
        """Dropped micro-experts of the layer, shared experts included."""
        return sum(len(indices) for indices in self.experts + self.shared)


@dataclass(frozen=True)
class Verification:
    """What was checked and found right.

    `num_checksums` files of weights and `num_side_checksums` others that engines read are those
    that `written_by`, compress or convert, wrote; 0 where it noted no checksums.
    `layers` is empty when there was no original to compare, and where tiers are `packed`: codes do
    not tell which micro-expert of the original they stand for. `refitted`: down vectors are not the
    original's, so that gate and up alone say whose a micro-expert is.
    """

    path: Path
    against: Path | None
    num_tensors: int
    total_bytes: int
    num_checksums: int
    num_side_checksums: int
    compressed: bool
    packed: bool
    refitted: bool
    written_by: str
    layers: tuple[LayerVerification, ...]

    def to_json(self) -> dict[str, Any]:
        """The verification as plain JSON values, dropped micro-experts listed one by one."""
        return {
            "path": str(self.path),
            "against": str(self.against) if self.against else None,
            "num_tensors": self.num_tensors,
            "total_bytes": self.total_bytes,
            "num_checksums": self.num_checksums,
            "num_side_checksums": self.num_side_checksums,
            "compressed": self.compressed,
            "packed": self.packed,
            "refitted": self.refitted,
            "written_by": self.written_by,
            "layers": [asdict(layer) | {"num_dropped": layer.num_dropped} for layer in self.layers],
        }


@dataclass(frozen=True)
class _Made:
    """What compression has left of the original's experts, in a checkpoint or what it was before.

    has_16_bits: some rows are the original's, and can be told from packed ones.
    """

    packed: bool
    has_16_bits: bool
    refitted: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Made":
        converted = None if checkpoint.quantization else read_conversion(checkpoint.path)
        made = checkpoint.quantization or converted
        if made is None:
            return cls(packed=False, has_16_bits=True, refitted=False)
        packed = min(made.bits) < 16
        # Nothing tells them apart once packed ones are 16-bit weights too.
        has_16_bits = not packed if converted else max(made.bits) == 16
        return cls(packed, has_16_bits, made.recipe.refit)


class _TensorError(CheckpointError):
    """A tensor is not the original's; `file` holds it."""

    def __init__(self, file: Path, message: str) -> None:
        super().__init__(f"{file}: {message}")
        self.file = file


def verify(
    path: Path, against: Path | None = None, *, on_progress: OnProgress | None = None
) -> Verification:
    """Check every tensor of `path` against its config, and read every weight for NaN and Inf.

    With `against`: the config is the original's, every tensor outside the experts is byte-equal to
    it, and every micro-expert kept in 16 bits is exactly one of the original's, none kept twice;
    packed ones are compared by `fidelity.output_errors`. Where down vectors were fitted to what was
    removed, gate and up are the original's. Zeros in a dense checkpoint count as dropped. Every
    file that an engine reads is compared with its checksum in camera_report.json, or of a converted
    checkpoint in camera_conversion.json.
    Raises `CheckpointError` naming the first tensor and row at fault, or the file, or both.
    """
    checkpoint = Checkpoint.open(path)
    original = _open_original(checkpoint, against) if against else None
    checksums = Checksums.of(checkpoint)
    made = _Made.of(checkpoint)
    total = _bytes_to_read(checkpoint, original, made) + checksums.num_bytes
    report = Reporter(total, torch.device("cpu"), on_progress, "bytes")
    report("verify", 0)
    hashed = partial(report.advance, "verify checksums")
    checksums.check_side_files(hashed)
    try:
        layers = _read_tensors(checkpoint, original, made, report)
    except _TensorError as error:
        raise CheckpointError(f"{error}{checksums.verdict(error.file)}") from error
    finally:
        checkpoint.release()
    checksums.check_weights(hashed, _which_tensor(against))
    return Verification(
        path=path,
        against=against,
        num_tensors=len(checkpoint.entries),
        total_bytes=checkpoint.total_bytes,
        num_checksums=len(checksums.weights),
        num_side_checksums=len(checksums.side_files),
        compressed=checkpoint.quantization is not None,
        packed=made.packed,
        refitted=made.refitted,
        written_by=checksums.command,
        layers=tuple(layers),
    )


def _which_tensor(against: Path | None) -> str:
    if against:
        return f"none of its tensors that can be compared with {against} differs"
    return "--against MODEL tells which of its tensors changed"


def _open_original(checkpoint: Checkpoint, against: Path) -> Checkpoint:
    original = Checkpoint.open(against)
    if original.quantization:
        raise CheckpointError(
            f"{against} is compressed itself (plan {original.quantization.recipe.goal}): "
            f"compare with the model that {checkpoint.path} was made from"
        )
    _check_same_model(checkpoint, original)
    _check_nothing_lost(checkpoint, original)
    return original


def _bytes_to_read(checkpoint: Checkpoint, original: Checkpoint | None, made: _Made) -> int:
    """What `_read_tensors` reads, the original's tensors included."""
    outside = checkpoint.total_bytes - checkpoint.expert_bytes
    if original is None:
        return checkpoint.total_bytes
    compared = original.expert_bytes if made.has_16_bits else 0
    return checkpoint.total_bytes + outside + compared


def _read_tensors(
    checkpoint: Checkpoint, original: Checkpoint | None, made: _Made, report: Reporter
) -> list[LayerVerification]:
    """Read all weights, and compare with the original's what both have in 16 bits."""
    for name in sorted(checkpoint.entries.keys() - checkpoint.expert_names):
        tensor = checkpoint.get(name)
        if original:
            _check_equal(checkpoint, original, name, tensor)
        report.advance("verify tensors", tensor.nbytes * (2 if original else 1))
    layers = []
    for layer in checkpoint.structure.moe_layers:
        read = _expert_bytes(checkpoint, layer)
        compares = original is not None and made.has_16_bits
        for name in _names(checkpoint, layer):
            # What is compared is read there.
            if not (compares and name.endswith(".weight")):
                checkpoint.get(name)
        if original and compares:
            compared = _verify_layer(checkpoint, original, layer, made)
            layers += [] if made.packed else [compared]
            read += _expert_bytes(original, layer)
        report.advance("verify tensors", read)
    return layers


def _expert_bytes(checkpoint: Checkpoint, layer: int) -> int:
    return sum(checkpoint.entries[name].num_bytes for name in _names(checkpoint, layer))


def _check_same_model(checkpoint: Checkpoint, original: Checkpoint) -> None:
    ours, theirs = (serving_config(c, quantization=None) for c in (checkpoint, original))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: {key} is {ours.get(key)!r}, but "
                f"{theirs.get(key)!r} in {original.path}: give the model it was made from"
            )


def _check_nothing_lost(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Draft layers and vision towers, of which config.json does not say what they consist of."""
    lost = sorted(original.carried_names - checkpoint.entries.keys())
    lost = [name for name in lost if not is_left_behind(name)]
    if lost:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {lost[0]} of {original.path} is missing ({len(lost)} such "
            "tensors): copy the checkpoint again, or compress again"
        )


def _check_equal(
    checkpoint: Checkpoint, original: Checkpoint, name: str, tensor: torch.Tensor
) -> None:
    if name not in original.entries:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} is not in {original.path}")
    _check_same_dtype(checkpoint, original, name)
    theirs = original.entries[name]
    outside = checkpoint.quantization.outside_experts if checkpoint.quantization else None
    if outside and theirs.coding and name in weights_of(outside):
        # Another scale may round to the same weights.
        own, others = (stored_parts(c, name, outside) for c in (checkpoint, original))
        for part in own:
            _compare(checkpoint, original, name, part, own[part], others[part])
    else:
        _compare(checkpoint, original, name, name, tensor, original.get(name))


def _compare(
    checkpoint: Checkpoint,
    original: Checkpoint,
    name: str,
    part: str,
    own: torch.Tensor,
    others: torch.Tensor,
) -> None:
    """Refuse a stored `part` of the tensor `name` that is not the original's, byte for byte."""
    ours, theirs = _bytes(own), _bytes(others)
    if torch.equal(ours, theirs):
        return
    rows = (ours != theirs).view(len(ours), -1).any(dim=1).nonzero().flatten().tolist()
    raise _TensorError(
        checkpoint.entries[name].file,
        f"tensor {part}, row {rows[0]} differs from {original.path} "
        f"({len(rows)} of {len(ours)} rows differ)",
    )


def _check_same_dtype(checkpoint: Checkpoint, original: Checkpoint, name: str) -> None:
    ours, theirs = checkpoint.entries[name].dtype, original.entries[name].dtype
    if ours != theirs:
        raise _TensorError(
            checkpoint.entries[name].file,
            f"tensor {name} is stored as {ours}, but as {theirs} in {original.path}",
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as uint8, `[rows, row_bytes]`: -0.0 is not 0.0 here."""
    rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.contiguous().view(rows, -1).view(torch.uint8)


def _expert_names(checkpoint: Checkpoint, layer: int) -> Iterator[ExpertNames]:
    """The three tensor names of every expert of a layer, shared experts last."""
    structure = checkpoint.structure
    for expert in range(structure.num_experts):
        yield {p: f"{structure.expert_prefix(layer, expert, p)}.weight" for p in PROJECTIONS}
    for _ in dense_layout(structure).shared:
        yield {p: f"{structure.shared_prefix(layer, p)}.weight" for p in PROJECTIONS}


def _names(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Every expert tensor of a layer."""
    prefix = f"{checkpoint.structure.moe_prefix(layer)}."
    return sorted(name for name in checkpoint.expert_names if name.startswith(prefix))


def _verify_layer(
    checkpoint: Checkpoint, original: Checkpoint, layer: int, made: _Made
) -> LayerVerification:
    experts = list(_expert_names(original, layer))
    dropped = [_dropped(checkpoint, original, names, made) for names in experts]
    num_experts = original.structure.num_experts
    present = [names["gate"] in checkpoint.entries for names in experts[:num_experts]]
    return LayerVerification(
        layer=layer,
        experts=tuple(dropped[:num_experts]),
        shared=tuple(dropped[num_experts:]),
        emptied=tuple(expert for expert, held in enumerate(present) if not held),
        original_micro_experts=original.structure.micro_experts_per_layer,
    )


def _dropped(
    checkpoint: Checkpoint, original: Checkpoint, names: ExpertNames, made: _Made
) -> tuple[int, ...]:
    """Original indices that the expert no longer holds, every kept one matched to its original."""
    ours, theirs = _read_expert(checkpoint, names), _read_expert(original, names)
    if ours and theirs:
        for name in names.values():
            _check_same_dtype(checkpoint, original, name)
    # Refitted down vectors are nobody's: gate and up say whose they are, checksums that they are
    # the ones that were written.
    compared = [p for p in PROJECTIONS if not (made.refitted and p == "down")]
    unmatched: dict[bytes, list[int]] = defaultdict(list)
    for index, triple in enumerate(_triples(theirs, compared)):
        unmatched[triple].append(index)
    for row, triple in enumerate(_triples(ours, compared)):
        if checkpoint.quantization is None and not any(triple):
            continue  # What `camera_serve.converters.dense` fills up with.
        if triple not in unmatched:
            raise _mismatch(checkpoint, original, names, row, ours, theirs, compared)
        if not unmatched[triple]:
            raise _TensorError(
                checkpoint.entries[names["gate"]].file,
                f"tensor {names['gate']}, row {row} is a micro-expert that the expert already "
                "holds in an earlier row",
            )
        unmatched[triple].pop(0)
    return tuple(sorted(index for indices in unmatched.values() for index in indices))


def _read_expert(checkpoint: Checkpoint, names: ExpertNames) -> dict[Projection, torch.Tensor]:
    """An expert's rows as bytes, `[d_ff_e, d_model * itemsize]` each; empty at d_ff_e = 0."""
    if names["gate"] not in checkpoint.entries:
        return {}
    weights = {projection: checkpoint.get(name) for projection, name in names.items()}
    return {p: _bytes(w.T if p == "down" else w) for p, w in weights.items()}


def _triples(
    rows: dict[Projection, torch.Tensor], compared: Sequence[Projection]
) -> Iterator[bytes]:
    if rows:
        for triple in torch.cat([rows[p] for p in compared], dim=1).numpy():
            yield triple.tobytes()


def _mismatch(
    checkpoint: Checkpoint,
    original: Checkpoint,
    names: ExpertNames,
    row: int,
    ours: dict[Projection, torch.Tensor],
    theirs: dict[Projection, torch.Tensor],
    compared: Sequence[Projection],
) -> _TensorError:
    for projection in compared:
        name = names[projection]
        known = theirs and (theirs[projection] == ours[projection][row]).all(dim=1).any()
        if not known:
            kind = "column" if projection == "down" else "row"
            return _TensorError(
                checkpoint.entries[name].file,
                f"tensor {name}, {kind} {row} is no {kind} of that tensor in {original.path}: its "
                "weights were changed",
            )
    return _TensorError(
        checkpoint.entries[names["gate"]].file,
        f"row {row} of {names['gate']} and its partners in {' and '.join(compared[1:])} are from "
        f"different micro-experts of {original.path}",
    )
