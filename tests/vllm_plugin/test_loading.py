"""The split of a ragged layer over ranks, and the loader that fills a rank's rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera_serve.checkpoint.experts import tier_rows
from camera_serve.checkpoint.format import DENSE_TIERS, Part, Tiers, part_shapes
from camera_serve.errors import CheckpointError
from camera_serve.models import Projection
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import dense_rows
from camera_serve.vllm_plugin.loading import (
    RankRows,
    RankSplit,
    RowLoader,
    padded_rows,
    part_dtype,
    split_layer,
)

D_MODEL = 32

tier_counts = st.integers(1, 3).flatmap(
    lambda tiers: st.lists(
        st.lists(st.integers(0, 9), min_size=tiers, max_size=tiers), min_size=1, max_size=6
    )
)


Row = tuple[int, int, int]


def rows_of(counts: list[list[int]], tp_size: int, tp_rank: int) -> list[list[Row]]:
    """By tier, (expert, tier, micro-expert of that tier) of every row of a rank, in order."""
    split = split_layer(counts, tp_size=tp_size, tp_rank=tp_rank)
    rows: list[dict[int, Row]] = [{} for _ in counts[0]]
    for expert, runs in enumerate(split.runs):
        for run in runs or ():
            for i in range(run.count):
                rows[run.tier][run.target + i] = (expert, run.tier, run.source + i)
    assert [sorted(tier) for tier in rows] == [list(range(n)) for n in split.num_rows]
    return [[tier[row] for row in sorted(tier)] for tier in rows]


@given(tier_counts, st.integers(1, 5))
def test_ranks_together_hold_every_micro_expert_exactly_once(
    counts: list[list[int]], tp_size: int
) -> None:
    held = [
        row for rank in range(tp_size) for tier in rows_of(counts, tp_size, rank) for row in tier
    ]
    everything = [
        (e, t, j) for e, tiers in enumerate(counts) for t, n in enumerate(tiers) for j in range(n)
    ]
    assert sorted(held) == everything


@given(tier_counts, st.integers(1, 5))
def test_every_tier_is_split_evenly(counts: list[list[int]], tp_size: int) -> None:
    for rank in range(tp_size):
        held = rows_of(counts, tp_size, rank)
        for expert, tiers in enumerate(counts):
            for tier, count in enumerate(tiers):
                share = sum(e == expert for e, _, _ in held[tier])
                assert share in (count // tp_size, -(-count // tp_size))


def test_three_ranks_on_widths_that_do_not_divide() -> None:
    counts = [[0], [1], [5], [7]]
    held = [[(e, j) for e, _, j in rows_of(counts, 3, rank)[0]] for rank in range(3)]
    assert held == [
        [(2, 0), (3, 0), (3, 1)],
        [(2, 1), (2, 2), (3, 2), (3, 3)],
        [(1, 0), (2, 3), (2, 4), (3, 4), (3, 5), (3, 6)],
    ]


def test_offsets_point_at_each_experts_rows() -> None:
    split = split_layer([[3, 1], [0, 0], [4, 2]], tp_size=2, tp_rank=1)
    assert split.offsets == ((0, 2, 2, 4), (0, 1, 1, 2))
    assert split.num_rows == (4, 2)


def test_experts_of_other_ranks_have_no_rows() -> None:
    split = split_layer([[3], [4], [5]], tp_size=1, tp_rank=0, held=[False, True, False])
    assert split.offsets == ((0, 0, 4, 4),)
    assert [runs is None for runs in split.runs] == [True, False, True]


@pytest.mark.parametrize(
    ("tiers", "tp_size", "rows"),
    [([0], 1, 1), ([0], 3, 1), ([1], 2, 1), ([37], 2, 19), ([37], 3, 13), ([1, 1], 2, 2)],
)
def test_padded_rows_are_those_of_the_largest_rank(
    tiers: list[int], tp_size: int, rows: int
) -> None:
    assert padded_rows([tiers], tp_size) == rows


@given(tier_counts, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_loader_puts_every_micro_expert_in_its_row(counts: list[list[int]], tp_size: int) -> None:
    tiers = Tiers((16, 3, 2)[-len(counts[0]) :], group_size=16)
    tensors = expert_tensors(counts, tiers)
    for rank in range(tp_size):
        split = split_layer(counts, tp_size=tp_size, tp_rank=rank)
        loader = RowLoader(split, tiers, name, D_MODEL)
        held = {p: rank_rows(split, tiers) for p in PROJECTIONS}
        for (expert, projection), parts in tensors.items():
            for part, tensor in parts.items():
                rows = held[projection].by_tier(split.num_rows, tiers.bits)
                assert loader.load(rows, tensor, expert, projection, part)
        loader.check_complete()
        for projection, rank_part in held.items():
            by_tier = rank_part.by_tier(split.num_rows, tiers.bits)
            for tier, (rows, wanted) in enumerate(
                zip(by_tier, rows_of(counts, tp_size, rank), strict=True)
            ):
                found = dense_rows(rows, slice(0, len(wanted)), torch.float32)
                for row, (expert, _, j) in zip(found, wanted, strict=True):
                    whole = tier_rows(
                        "",
                        projection,
                        dotted(tensors[expert, projection]),
                        counts[expert],
                        tiers,
                        D_MODEL,
                    )[tier]
                    assert row.equal(dense_rows(whole, slice(j, j + 1), torch.float32)[0])


def test_loader_casts_to_the_served_dtype() -> None:
    loader = RowLoader(split_layer([[2]], tp_size=1, tp_rank=0), DENSE_TIERS, name, D_MODEL)
    rows = torch.empty(2, D_MODEL, dtype=torch.bfloat16)
    tensor = torch.full((2, D_MODEL), 1.0 + 2**-10)
    loader.load([rows], tensor, 0, "gate")
    assert torch.equal(rows, torch.ones(2, D_MODEL, dtype=torch.bfloat16))


def test_loader_leaves_experts_of_other_ranks_alone() -> None:
    split = split_layer([[2], [3]], tp_size=1, tp_rank=0, held=[False, True])
    loader = RowLoader(split, DENSE_TIERS, name, D_MODEL, ("gate",))
    rows = torch.zeros(3, D_MODEL)
    assert not loader.load([rows], torch.ones(2, D_MODEL), 0, "gate")
    assert not rows.any()
    assert loader.load([rows], torch.ones(3, D_MODEL), 1, "gate")
    loader.check_complete()


@pytest.mark.parametrize(
    ("projection", "shape", "wanted"),
    [("gate", (4, 32), "[3, 32]"), ("gate", (3, 5), "[3, 32]"), ("down", (3, 32), "[32, 3]")],
)
def test_a_misshapen_tensor_is_named(projection: str, shape: tuple[int, int], wanted: str) -> None:
    loader = RowLoader(split_layer([[2], [3]], tp_size=1, tp_rank=0), DENSE_TIERS, name, D_MODEL)
    with pytest.raises(CheckpointError) as caught:
        loader.load([torch.zeros(5, D_MODEL)], torch.ones(shape), 1, projection)
    assert f"layer.1.{projection}.weight has shape {list(shape)}" in str(caught.value)
    assert str(caught.value).endswith(f"implies {wanted}")


def test_an_expert_too_many_is_named() -> None:
    loader = RowLoader(split_layer([[2]], tp_size=1, tp_rank=0), DENSE_TIERS, name, D_MODEL)
    with pytest.raises(
        CheckpointError, match=r"layer\.1\.up\.weight belongs to expert 1; .* counts 1 "
    ):
        loader.load([torch.zeros(2, D_MODEL)], torch.ones(2, D_MODEL), 1, "up")


def test_a_tensor_that_never_came_is_named() -> None:
    loader = RowLoader(
        split_layer([[2], [0], [3]], tp_size=1, tp_rank=0), DENSE_TIERS, name, D_MODEL
    )
    tensors = expert_tensors([[2], [0], [3]], DENSE_TIERS)
    for (expert, projection), parts in tensors.items():
        if (expert, projection) != (2, "up") and parts:
            loader.load([torch.zeros(5, D_MODEL)], parts["weight"], expert, projection)
    with pytest.raises(CheckpointError, match=r"layer\.2\.up\.weight was not loaded \(1 of this"):
        loader.check_complete()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_are_named(bad: float) -> None:
    tiers = Tiers((2,), group_size=16)
    split = split_layer([[3]], tp_size=1, tp_rank=0)
    loader, parts = RowLoader(split, tiers, name, D_MODEL), expert_tensors([[3]], tiers)[0, "up"]
    parts["scales"][1, 1] = bad
    rows = rank_rows(split, tiers).by_tier(split.num_rows, tiers.bits)
    with pytest.raises(
        CheckpointError, match=r"layer\.0\.up\.scales holds scales that are not pos"
    ):
        loader.load(rows, parts["scales"], 0, "up", "scales")


def test_packed_words_of_the_wrong_length_are_named() -> None:
    tiers = Tiers((3, 1), group_size=16)
    split = split_layer([[2, 4]], tp_size=1, tp_rank=0)
    loader = RowLoader(split, tiers, name, D_MODEL)
    rows = rank_rows(split, tiers).by_tier(split.num_rows, tiers.bits)
    with pytest.raises(CheckpointError, match=r"qweight has shape \[9\], .* implies \[10\]"):
        loader.load(rows, torch.zeros(9, dtype=torch.int32), 0, "gate", "qweight")


def name(expert: int, projection: str) -> str:
    return f"layer.{expert}.{projection}"


def expert_tensors(
    counts: list[list[int]], tiers: Tiers
) -> dict[tuple[int, Projection], dict[Part, torch.Tensor]]:
    """Random parts of every expert's projections; those of no rows are left out."""
    tensors = {}
    for expert, widths in enumerate(counts):
        for projection in PROJECTIONS:
            shapes = part_shapes(projection, D_MODEL, widths, tiers)
            parts = {p: random_part(p, shape) for p, shape in shapes.items() if 0 not in shape}
            tensors[expert, projection] = parts
    return tensors


def random_part(part: Part, shape: tuple[int, ...]) -> torch.Tensor:
    if part == "qweight":
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    values = torch.randn(shape)
    return values if part == "weight" else (values.abs() + 0.1).half()


def rank_rows(split: RankSplit, tiers: Tiers) -> RankRows:
    shapes = RankRows.shapes(split.num_rows, tiers, D_MODEL)
    empty = {p: torch.empty(s, dtype=part_dtype(p, torch.float32)) for p, s in shapes.items()}
    return RankRows(**empty)


def dotted(parts: dict[Part, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f".{part}": tensor for part, tensor in parts.items()}
