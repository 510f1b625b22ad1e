"""Which rows of a ragged layer a rank holds, and how tensors get there. Nothing of vLLM here."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from camera_serve.checkpoint.format import (
    CameraQuantizationConfig,
    Part,
    Shapes,
    Tiers,
    checkpoint_shapes,
    part_shapes,
)
from camera_serve.checkpoint.kept import scale_shapes
from camera_serve.checkpoint.reader import Checkpoint, check_shapes
from camera_serve.errors import CheckpointError
from camera_serve.models import MoeStructure, Projection
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.packing import words_per_row

DUMMY_SCALE = 2.0**-8

TierCounts = Sequence[Sequence[int]]
"""Micro-experts by expert and tier: `counts[e][t]`, as the checkpoint states them."""


@dataclass(frozen=True)
class Run:
    """`count` consecutive micro-experts of a tier: from row `source` of an expert's to row `target`
    of a rank's.
    """

    tier: int
    source: int
    target: int
    count: int


@dataclass(frozen=True)
class RankSplit:
    """The micro-experts of one layer that one rank holds.

    counts: `[experts][tiers]` in the checkpoint. `runs[e]`: what the rank takes of expert e, None
    where the expert lies on another rank.
    """

    counts: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[Run, ...] | None, ...]

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per tier t, `num_experts + 1` rows; expert e owns `offsets[t][e]:offsets[t][e + 1]`."""
        return tuple(
            tuple(accumulate((self._held(expert, tier) for expert in self.runs), initial=0))
            for tier in range(len(self.counts[0]))
        )

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Micro-experts of each tier on this rank."""
        return tuple(offsets[-1] for offsets in self.offsets)

    @staticmethod
    def _held(runs: tuple[Run, ...] | None, tier: int) -> int:
        return sum(run.count for run in runs or () if run.tier == tier)


def split_layer(
    counts: TierCounts, *, tp_size: int, tp_rank: int, held: Sequence[bool] | None = None
) -> RankSplit:
    """Cut a layer for one rank: rows `[n·r//tp, n·(r+1)//tp)` of every tier of every held expert.

    Micro-experts are independent summands of the layer's output (paper, Eq. 4), so the ranks'
    outputs add up to the layer's for any cut. `held` None: every expert (no expert parallelism).
    """
    runs: list[tuple[Run, ...] | None] = []
    filled = [0] * len(counts[0])
    for expert, tiers in enumerate(counts):
        if held is not None and not held[expert]:
            runs.append(None)
            continue
        taken = []
        for tier, count in enumerate(tiers):
            start, end = count * tp_rank // tp_size, count * (tp_rank + 1) // tp_size
            if end > start:
                taken.append(Run(tier, start, filled[tier], end - start))
            filled[tier] += end - start
        runs.append(tuple(taken))
    return RankSplit(counts=tuple(tuple(tiers) for tiers in counts), runs=tuple(runs))


@dataclass(frozen=True)
class RankRows:
    """The tensors that hold one projection of a rank's experts, all tiers of a kind in one.

    weight: `[num_rows_16, d_model]`; qweight: int32 `[words]`, tier after tier; scales, zeros:
    float16 `[num_rows_packed, groups]`, in the order of qweight.
    """

    weight: torch.Tensor
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @staticmethod
    def shapes(num_rows: Sequence[int], tiers: Tiers, d_model: int) -> dict[Part, tuple[int, ...]]:
        """The shape of each tensor, for a rank's rows in each tier."""
        # Down is stored like gate and up here: one micro-expert, one row.
        return part_shapes("gate", d_model, num_rows, tiers)

    def by_tier(self, num_rows: Sequence[int], bits: Sequence[int]) -> list[Rows]:
        """Views of the rows, tier by tier, as the kernel takes them."""
        rows: list[Rows] = []
        word = row = 0
        d_model = self.weight.shape[1]
        for count, b in zip(num_rows, bits, strict=True):
            if b == 16:
                rows.append(self.weight)
                continue
            per_row = words_per_row(d_model, b)
            words = self.qweight[word : word + count * per_row].view(count, per_row)
            span = slice(row, row + count)
            rows.append(PackedRows(b, words, self.scales[span], self.zeros[span]))
            word, row = word + count * per_row, row + count
        return rows


def ragged_layer(
    gate: RankRows, up: RankRows, down: RankRows, split: RankSplit, bits: Sequence[int]
) -> RaggedLayer:
    """The three projections of a rank's experts as the kernels take them: views."""
    by_tier = (rows.by_tier(split.num_rows, bits) for rows in (gate, up, down))
    tiers = zip(*by_tier, split.offsets, strict=True)
    return RaggedLayer(tuple(RaggedTier(*tier) for tier in tiers))


def part_dtype(part: Part, params_dtype: torch.dtype) -> torch.dtype:
    """What a part is held in: codes in int32 words, grids in float16, weights as served."""
    return {"weight": params_dtype, "qweight": torch.int32}.get(part, torch.float16)


def fill_dummy_grids(*scales: torch.Tensor) -> None:
    """Give packed rows of random codes scales of an ordinary size, in place."""
    for tensor in scales:
        tensor.data.fill_(DUMMY_SCALE)


def padded_rows(counts: TierCounts, tp_size: int) -> int:
    """Rows of the largest rank; at least one, as vLLM's CPU GEMM dies of a matrix without rows."""
    splits = (split_layer(counts, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size))
    return max(1, *(sum(split.num_rows) for split in splits))


class RowLoader:
    """Copies the expert tensors of one layer into a rank's rows, and knows what is missing.

    `name(expert, projection)` is the checkpoint name of a projection, for messages.
    """

    def __init__(
        self,
        split: RankSplit,
        tiers: Tiers,
        name: Callable[[int, Projection], str],
        d_model: int,
        projections: Sequence[Projection] = PROJECTIONS,
    ) -> None:
        self.split = split
        self._tiers = tiers
        self._name = name
        self._d_model = d_model
        self._expected = frozenset(
            (expert, projection, part)
            for expert, runs in enumerate(split.runs)
            for projection in projections
            if runs is not None
            for part, shape in self._shapes(expert, projection).items()
            if 0 not in shape
        )
        self._missing = set(self._expected)

    def load(
        self,
        rows: Sequence[Rows],
        tensor: torch.Tensor,
        expert: int,
        projection: Projection,
        part: Part = "weight",
    ) -> bool:
        """Copy this rank's micro-experts of one checkpoint tensor; False if it holds none of them.

        rows: the projection's rows on this rank, tier by tier; tensor: a part of the expert's
        projection as the checkpoint has it. Raises `CheckpointError` for another shape, for scales
        that are not positive, and for an expert the layer does not have.
        """
        if not 0 <= expert < len(self.split.runs):
            raise CheckpointError(
                f"tensor {self._name(expert, projection)}.{part} belongs to expert {expert}; "
                f"quantization_config counts {len(self.split.runs)} experts in this layer"
            )
        runs = self.split.runs[expert]
        if runs is None:
            return False
        self._check(tensor, expert, projection, part)
        source = tensor.t() if projection == "down" and part == "weight" else tensor
        by_tier = _split_part(source, part, self.split.counts[expert], self._tiers, self._d_model)
        for run in runs:
            target = _part_of(rows[run.tier], part)
            if target is not None:
                taken = by_tier[run.tier][run.source : run.source + run.count]
                target[run.target : run.target + run.count].copy_(taken)
        self._missing.discard((expert, projection, part))
        return True

    def check_complete(self) -> None:
        """Raise `CheckpointError` naming the first tensor that never arrived.

        If none is missing, the next loading starts anew.
        """
        if self._missing:
            expert, projection, part = min(self._missing)
            raise CheckpointError(
                f"tensor {self._name(expert, projection)}.{part} was not loaded "
                f"({len(self._missing)} of this layer are missing): a safetensors shard is missing "
                "or incomplete; copy or compress the checkpoint again"
            )
        self._missing = set(self._expected)

    def _shapes(self, expert: int, projection: Projection) -> dict[Part, tuple[int, ...]]:
        counts = self.split.counts[expert]
        return part_shapes(projection, self._d_model, counts, self._tiers)

    def _check(self, tensor: torch.Tensor, expert: int, projection: Projection, part: Part) -> None:
        wanted = self._shapes(expert, projection)[part]
        name = f"{self._name(expert, projection)}.{part}"
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, quantization_config implies "
                f"{list(wanted)}"
            )
        if part == "qweight" and tensor.dtype != torch.int32:
            raise CheckpointError(f"tensor {name} is stored as {tensor.dtype}, wanted torch.int32")
        if part == "scales" and not ((tensor > 0) & tensor.isfinite()).all():
            raise CheckpointError(
                f"tensor {name} holds scales that are not positive: the file is damaged; copy or "
                "compress the checkpoint again"
            )
        if part == "zeros" and not tensor.isfinite().all():
            raise CheckpointError(
                f"tensor {name} holds zeros that are NaN or Inf: the file is damaged; copy or "
                "compress the checkpoint again"
            )


def _split_part(
    tensor: torch.Tensor, part: Part, counts: Sequence[int], tiers: Tiers, d_model: int
) -> dict[int, torch.Tensor]:
    """One tensor of an expert's projection as rows, by tier."""
    packed = {t: n for t, (n, b) in enumerate(zip(counts, tiers.bits, strict=True)) if b < 16}
    if part == "weight":
        return {tiers.bits.index(16): tensor}
    if part != "qweight":
        return dict(zip(packed, tensor.split(list(packed.values())), strict=True))
    per_row = {tier: words_per_row(d_model, tiers.bits[tier]) for tier in packed}
    words = tensor.split([count * per_row[tier] for tier, count in packed.items()])
    rows = (w.view(-1, per_row[tier]) for tier, w in zip(packed, words, strict=True))
    return dict(zip(packed, rows, strict=True))


def _part_of(rows: Rows, part: Part) -> torch.Tensor | None:
    """The tensor of a tier's rows that a checkpoint tensor of kind `part` goes to."""
    if isinstance(rows, PackedRows):
        return {"qweight": rows.words, "scales": rows.scales, "zeros": rows.zeros}.get(part)
    return rows if part == "weight" else None


@dataclass(frozen=True)
class StoredNames:
    """What a checkpoint holds, by name.

    carried: tensors that are not the model's own; biased: the model's own modules with a bias;
    unbiased: those with a weight alone.
    """

    carried: frozenset[str] = frozenset()
    biased: frozenset[str] = frozenset()
    unbiased: frozenset[str] = frozenset()

    @classmethod
    def sort(cls, found: Set[str], own: Set[str]) -> "StoredNames":
        """Of all tensors, those of the model itself among them."""
        biased = {name.removesuffix(".bias") for name in own if name.endswith(".bias")}
        weights = {name.removesuffix(".weight") for name in own if name.endswith(".weight")}
        return cls(frozenset(found - own), frozenset(biased), frozenset(weights - biased))


def check_folder(path: Path) -> StoredNames | None:
    """Compare every tensor of a checkpoint folder with its config, from the headers alone.

    Raises `CheckpointError` naming a missing, extra or misshapen tensor, a missing or broken file,
    or a count that does not fit. A folder without any weights passes, as None: `--load-format
    dummy` needs none, and every other load format says itself that it found none.
    """
    if not _holds_weights(path):
        return None
    checkpoint = Checkpoint.open(path)
    return StoredNames.sort(checkpoint.entries.keys(), checkpoint.expected_shapes.keys())


def check_hub_model(
    model: str,
    config: PreTrainedConfig,
    structure: MoeStructure,
    quantization: CameraQuantizationConfig,
    found: Shapes,
) -> StoredNames | None:
    """Like `check_folder` for a model on the hub; `found`: the shapes its headers state.

    An empty `found` passes: the hub could not be asked, and loading itself counts what arrives.
    """
    if not found:
        return None
    wanted = checkpoint_shapes(config, structure, quantization)
    if quantization.outside_experts:
        wanted |= scale_shapes(quantization.outside_experts, wanted)
    check_shapes(found, wanted, structure, Path(model))
    return StoredNames.sort(found.keys(), wanted.keys())


def _holds_weights(path: Path) -> bool:
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
    return any(next(path.glob(pattern), None) for pattern in patterns)
