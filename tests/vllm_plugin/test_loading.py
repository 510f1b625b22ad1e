"""The split of a ragged layer over ranks, and the loader that fills a rank's rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camera_serve.errors import CheckpointError
from camera_serve.vllm_plugin.loading import RowLoader, padded_rows, split_layer

D_MODEL = 6

tier_counts = st.integers(1, 3).flatmap(
    lambda tiers: st.lists(
        st.lists(st.integers(0, 9), min_size=tiers, max_size=tiers), min_size=1, max_size=6
    )
)


def rows_of(counts: list[list[int]], tp_size: int, tp_rank: int) -> list[tuple[int, int]]:
    """(expert, micro-expert) of every row of a rank, in storage order."""
    split = split_layer(counts, tp_size=tp_size, tp_rank=tp_rank)
    rows: dict[int, tuple[int, int]] = {}
    for expert, runs in enumerate(split.runs):
        for run in runs or ():
            for i in range(run.count):
                rows[run.target + i] = (expert, run.source + i)
    assert sorted(rows) == list(range(split.num_rows))
    return [rows[row] for row in sorted(rows)]


@given(tier_counts, st.integers(1, 5))
def test_ranks_together_hold_every_micro_expert_exactly_once(
    counts: list[list[int]], tp_size: int
) -> None:
    held = [row for rank in range(tp_size) for row in rows_of(counts, tp_size, rank)]
    everything = [(e, j) for e, tiers in enumerate(counts) for j in range(sum(tiers))]
    assert sorted(held) == everything


@given(tier_counts, st.integers(1, 5))
def test_every_tier_is_split_evenly(counts: list[list[int]], tp_size: int) -> None:
    for rank in range(tp_size):
        held = rows_of(counts, tp_size, rank)
        for expert, tiers in enumerate(counts):
            start = 0
            for count in tiers:
                share = sum(e == expert and start <= j < start + count for e, j in held)
                assert share in (count // tp_size, -(-count // tp_size))
                start += count


def test_three_ranks_on_widths_that_do_not_divide() -> None:
    counts = [[0], [1], [5], [7]]
    held = [rows_of(counts, 3, rank) for rank in range(3)]
    assert held == [
        [(2, 0), (3, 0), (3, 1)],
        [(2, 1), (2, 2), (3, 2), (3, 3)],
        [(1, 0), (2, 3), (2, 4), (3, 4), (3, 5), (3, 6)],
    ]


def test_offsets_point_at_each_experts_rows() -> None:
    split = split_layer([[3], [0], [4, 2]], tp_size=2, tp_rank=1)
    assert split.offsets == (0, 2, 2, 5)
    assert split.d_ff == (3, 0, 6)


def test_experts_of_other_ranks_have_no_rows() -> None:
    split = split_layer([[3], [4], [5]], tp_size=1, tp_rank=0, held=[False, True, False])
    assert split.offsets == (0, 0, 4, 4)
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
def test_loader_puts_every_micro_expert_in_its_row(counts: list[list[int]], tp_size: int) -> None:
    tensors = expert_tensors(counts)
    for rank in range(tp_size):
        split = split_layer(counts, tp_size=tp_size, tp_rank=rank)
        loader = RowLoader(split, name, D_MODEL)
        matrices = {p: torch.full((split.num_rows, D_MODEL), -1.0) for p in ("gate", "up", "down")}
        for (expert, projection), tensor in tensors.items():
            assert loader.load(matrices[projection], tensor, expert, projection)
        loader.check_complete()
        for projection, matrix in matrices.items():
            for row, (expert, j) in zip(matrix, rows_of(counts, tp_size, rank), strict=True):
                tensor = tensors[expert, projection]
                assert torch.equal(row, tensor[:, j] if projection == "down" else tensor[j])


def test_loader_casts_to_the_served_dtype() -> None:
    loader = RowLoader(split_layer([[2]], tp_size=1, tp_rank=0), name, D_MODEL)
    rows = torch.empty(2, D_MODEL, dtype=torch.bfloat16)
    tensor = torch.full((2, D_MODEL), 1.0 + 2**-10)
    loader.load(rows, tensor, 0, "gate")
    assert torch.equal(rows, torch.ones(2, D_MODEL, dtype=torch.bfloat16))


def test_loader_leaves_experts_of_other_ranks_alone() -> None:
    split = split_layer([[2], [3]], tp_size=1, tp_rank=0, held=[False, True])
    loader = RowLoader(split, name, D_MODEL, ("gate",))
    rows = torch.zeros(3, D_MODEL)
    assert not loader.load(rows, torch.ones(2, D_MODEL), 0, "gate")
    assert not rows.any()
    assert loader.load(rows, torch.ones(3, D_MODEL), 1, "gate")
    loader.check_complete()


@pytest.mark.parametrize(
    ("projection", "shape", "wanted"),
    [("gate", (4, 6), "[3, 6]"), ("gate", (3, 5), "[3, 6]"), ("down", (3, 6), "[6, 3]")],
)
def test_a_misshapen_tensor_is_named(projection: str, shape: tuple[int, int], wanted: str) -> None:
    loader = RowLoader(split_layer([[2], [3]], tp_size=1, tp_rank=0), name, D_MODEL)
    with pytest.raises(CheckpointError) as caught:
        loader.load(torch.zeros(5, D_MODEL), torch.ones(shape), 1, projection)
    assert f"layer.1.{projection} has shape {list(shape)}" in str(caught.value)
    assert str(caught.value).endswith(f"implies {wanted}")


def test_an_expert_too_many_is_named() -> None:
    loader = RowLoader(split_layer([[2]], tp_size=1, tp_rank=0), name, D_MODEL)
    with pytest.raises(CheckpointError, match=r"layer\.1\.up belongs to expert 1; .* counts 1 "):
        loader.load(torch.zeros(2, D_MODEL), torch.ones(2, D_MODEL), 1, "up")


def test_a_tensor_that_never_came_is_named() -> None:
    loader = RowLoader(split_layer([[2], [0], [3]], tp_size=1, tp_rank=0), name, D_MODEL)
    tensors = expert_tensors([[2], [0], [3]])
    for (expert, projection), tensor in tensors.items():
        if (expert, projection) != (2, "up") and tensor.numel():
            loader.load(torch.zeros(5, D_MODEL), tensor, expert, projection)
    with pytest.raises(CheckpointError, match=r"layer\.2\.up was not loaded \(1 of this layer"):
        loader.check_complete()


def name(expert: int, projection: str) -> str:
    return f"layer.{expert}.{projection}"


def expert_tensors(counts: list[list[int]]) -> dict[tuple[int, str], torch.Tensor]:
    tensors = {}
    for expert, tiers in enumerate(counts):
        for projection in ("gate", "up", "down"):
            tensor = torch.randn(sum(tiers), D_MODEL)
            tensors[expert, projection] = tensor.t() if projection == "down" else tensor
    return tensors
