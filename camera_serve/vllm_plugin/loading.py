"""Which rows of a ragged layer a rank holds, and how tensors get there. Nothing of vLLM here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from camera_serve.checkpoint.format import CameraQuantizationConfig, Shapes, checkpoint_shapes
from camera_serve.checkpoint.reader import Checkpoint, check_shapes
from camera_serve.errors import CheckpointError
from camera_serve.models import MoeStructure, Projection
from camera_serve.models.structure import PROJECTIONS

TierCounts = Sequence[Sequence[int]]
"""Micro-experts by expert and tier: `counts[e][t]`, as the checkpoint states them."""


@dataclass(frozen=True)
class Run:
    """`count` consecutive micro-experts: row `source` of an expert, row `target` of a rank."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class RankSplit:
    """The micro-experts of one layer that one rank holds.

    `runs[e]`: what the rank takes of expert e, in storage order; None where the expert lies on
    another rank. `d_ff[e]`: the width of expert e in the checkpoint.
    """

    d_ff: tuple[int, ...]
    runs: tuple[tuple[Run, ...] | None, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`num_experts + 1` row indices; expert e owns the rows `offsets[e]:offsets[e + 1]`."""
        widths = (sum(run.count for run in runs or ()) for runs in self.runs)
        return tuple(accumulate(widths, initial=0))

    @property
    def num_rows(self) -> int:
        """Micro-experts of the layer on this rank."""
        return self.offsets[-1]


def split_layer(
    counts: TierCounts, *, tp_size: int, tp_rank: int, held: Sequence[bool] | None = None
) -> RankSplit:
    """Cut a layer for one rank: rows `[n·r//tp, n·(r+1)//tp)` of every tier of every held expert.

    Micro-experts are independent summands of the layer's output (paper, Eq. 4), so the ranks'
    outputs add up to the layer's for any cut. `held` None: every expert (no expert parallelism).
    """
    runs: list[tuple[Run, ...] | None] = []
    target = 0
    for expert, tiers in enumerate(counts):
        if held is not None and not held[expert]:
            runs.append(None)
            continue
        taken, source = [], 0
        for count in tiers:
            start, end = count * tp_rank // tp_size, count * (tp_rank + 1) // tp_size
            if end > start:
                taken.append(Run(source + start, target, end - start))
            target += end - start
            source += count
        runs.append(tuple(taken))
    return RankSplit(d_ff=tuple(sum(tiers) for tiers in counts), runs=tuple(runs))


def padded_rows(counts: TierCounts, tp_size: int) -> int:
    """Rows of the largest rank; at least one, as vLLM's CPU GEMM dies of a matrix without rows."""
    splits = (split_layer(counts, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size))
    return max(1, *(split.num_rows for split in splits))


class RowLoader:
    """Copies the expert tensors of one layer into a rank's rows, and knows what is missing.

    `name(expert, projection)` is the checkpoint name of a tensor, for messages.
    """

    def __init__(
        self,
        split: RankSplit,
        name: Callable[[int, Projection], str],
        d_model: int,
        projections: Sequence[Projection] = PROJECTIONS,
    ) -> None:
        self.split = split
        self._name = name
        self._d_model = d_model
        self._missing = {
            (expert, projection)
            for expert, (width, runs) in enumerate(zip(split.d_ff, split.runs, strict=True))
            for projection in projections
            if width and runs is not None
        }

    def load(
        self, rows: torch.Tensor, tensor: torch.Tensor, expert: int, projection: Projection
    ) -> bool:
        """Copy this rank's micro-experts of one checkpoint tensor; False if it holds none of them.

        rows: `[num_rows, d_model]`, one micro-expert per row for every projection; tensor:
        `[d_ff_e, d_model]`, for down `[d_model, d_ff_e]`. Raises `CheckpointError` for any other
        shape, and for an expert the layer does not have.
        """
        if not 0 <= expert < len(self.split.runs):
            raise CheckpointError(
                f"tensor {self._name(expert, projection)} belongs to expert {expert}; "
                f"quantization_config counts {len(self.split.runs)} experts in this layer"
            )
        runs = self.split.runs[expert]
        if runs is None:
            return False
        self._check_shape(tensor, expert, projection)
        source = tensor.t() if projection == "down" else tensor
        for run in runs:
            part = source[run.source : run.source + run.count]
            rows[run.target : run.target + run.count].copy_(part)
        self._missing.discard((expert, projection))
        return True

    def check_complete(self) -> None:
        """Raise `CheckpointError` naming the first tensor that never arrived."""
        if self._missing:
            expert, projection = min(self._missing)
            raise CheckpointError(
                f"tensor {self._name(expert, projection)} was not loaded ({len(self._missing)} of "
                "this layer are missing): a safetensors shard is missing or incomplete; copy or "
                "compress the checkpoint again"
            )

    def _check_shape(self, tensor: torch.Tensor, expert: int, projection: Projection) -> None:
        wanted = [self.split.d_ff[expert], self._d_model]
        if projection == "down":
            wanted.reverse()
        if list(tensor.shape) != wanted:
            raise CheckpointError(
                f"tensor {self._name(expert, projection)} has shape {list(tensor.shape)}, "
                f"quantization_config implies {wanted}"
            )


def check_folder(path: Path) -> None:
    """Compare every tensor of a checkpoint folder with its config, from the headers alone.

    Raises `CheckpointError` naming a missing, extra or misshapen tensor, a missing or broken file,
    or a count that does not fit. A folder without any weights passes: `--load-format dummy` needs
    none, and every other load format says itself that it found none.
    """
    if _holds_weights(path):
        Checkpoint.open(path)


def check_hub_model(
    model: str,
    config: PreTrainedConfig,
    structure: MoeStructure,
    quantization: CameraQuantizationConfig,
    found: Shapes,
) -> None:
    """Like `check_folder` for a model on the hub; `found`: the shapes its headers state.

    An empty `found` passes: the hub could not be asked, and loading itself counts what arrives.
    """
    if found:
        wanted = checkpoint_shapes(config, structure, quantization)
        check_shapes(found, wanted, structure, Path(model))


def _holds_weights(path: Path) -> bool:
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
    return any(next(path.glob(pattern), None) for pattern in patterns)
