"""The Triton kernels against the reference in float64.

Without a GPU they run in Triton's interpreter. It must be chosen before Triton is imported, so one
test runs this file again in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from bench.shapes.published import SHAPES, Shape, layer_counts
from camera_serve.kernels.triton import TritonLayer, TritonTier, layout, pack_layer, ragged_moe
from camera_serve.kernels.triton import moe as moe_module
from camera_serve.kernels.triton import routing as routing_module
from camera_serve.kernels.triton import tiles as tiles_module
from camera_serve.kernels.triton.routing import route
from camera_serve.kernels.triton.tiles import (
    Tiles,
    bundles,
    choose,
    matrix_unit,
    side_by_side,
    split_rows,
)
from camera_serve.kernels.triton.tuned import TABLES
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows, dense_rows
from camera_serve.ragged.layer import ragged_moe as reference
from camera_serve.ragged.packing import pack
from camera_serve.recipe import TierPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.mark.gpu
# The interpreter's dot is wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
DEVICE = "cpu" if INTERPRETED else "cuda"
HOPPER = TABLES["wgmma"]


def here(test: Callable[..., None]) -> Callable[..., None]:
    """Runs in the interpreter, or on a GPU."""
    return test if INTERPRETED else GPU(test)


TOLERANCE = {
    # Dot products of at most 150 terms: some roundings of 6e-8 on values of order 1.
    torch.float32: 2e-6,
    # Activations, each slot's output and the sum are rounded to `dtype` once each, weights of
    # packed tiers, their scales and zeros as well: a few half units in the last place.
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_everything_holds_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 40, done.stdout[-2000:]


def tier(
    bits: int, widths: Sequence[int], d_model: int, group: int, dtype: torch.dtype
) -> RaggedTier:
    """Weights of the size that keeps outputs of order 1."""
    rows = sum(widths)
    offsets = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
    matrices = [_rows(bits, rows, d_model, group, dtype) for _ in range(3)]
    return RaggedTier(*matrices, offsets=offsets)


def _rows(bits: int, rows: int, d_model: int, group: int, dtype: torch.dtype) -> Rows:
    std = d_model**-0.5
    if bits == 16:
        return torch.randn(rows, d_model, device=DEVICE).mul(std).to(dtype)
    codes = torch.randint(0, 2**bits, (rows, d_model))
    scales = (torch.rand(rows, d_model // group) + 0.5) * 3 * std / 2**bits
    zeros = -scales * (2**bits - 1) / 2 + torch.randn(scales.shape) * std / 4
    parts = (pack(codes, bits), scales.half(), zeros.half())
    return PackedRows(bits, *(part.to(DEVICE) for part in parts))


def make_layer(
    counts: Sequence[Sequence[int]],
    bits: Sequence[int],
    dtype: torch.dtype,
    d_model: int = 64,
    group: int = 32,
) -> RaggedLayer:
    """counts: micro-experts by expert and tier."""
    by_tier = zip(*counts, strict=True)
    tiers = (tier(b, w, d_model, group, dtype) for b, w in zip(bits, by_tier, strict=True))
    return RaggedLayer(tuple(tiers))


def in_float64(layer: RaggedLayer) -> RaggedLayer:
    tiers = []
    for t in layer.tiers:
        rows = [dense_rows(m, slice(None), torch.float32).double() for m in (t.gate, t.up, t.down)]
        tiers.append(RaggedTier(*rows, offsets=t.offsets))
    return RaggedLayer(tuple(tiers))


def expected(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: RaggedLayer
) -> torch.Tensor:
    """The reference computes in the dtype of its inputs, but adds the experts up in float32."""
    exact, out = in_float64(layer), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for slot in range(ids.shape[1]):
        one = torch.ones_like(weights[:, :1])
        share = weights[:, slot, None].double()
        out += reference(x.double(), one, ids[:, slot, None], exact) * share
    return out


def route_randomly(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return torch.rand(num_tokens, top_k, device=DEVICE), ids.to(DEVICE, torch.int32)


def check(
    layer: RaggedLayer,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    wanted = expected(x, weights, ids, layer)
    out = ragged_moe(x, weights, ids, pack_layer(deepcopy(layer), x.dtype), tiles)
    assert out.shape == x.shape and out.dtype == x.dtype
    error = (out.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error < TOLERANCE[x.dtype]
    return out


def random_x(num_tokens: int, d_model: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, d_model, device=DEVICE).to(dtype)


HOSTILE = {
    "widths 0, 1, odd and wide": [(0,), (1,), (7,), (70,)],
    "one expert holds all": [(0,), (0,), (33,), (0,)],
    "nothing is left": [(0,), (0,), (0,), (0,)],
}


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("counts", HOSTILE.values(), ids=HOSTILE.keys())
def test_it_is_the_reference_on_hostile_widths(
    counts: list[tuple[int]], num_tokens: int, dtype: torch.dtype
) -> None:
    layer = make_layer(counts, [16], dtype)
    out = check(layer, random_x(num_tokens, 64, dtype), *route_randomly(num_tokens, 4, 2))
    assert out.isfinite().all()


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_packed_rows_of_any_bits(bits: int, dtype: torch.dtype) -> None:
    layer = make_layer([(5,), (0,), (1,), (40,)], [bits], dtype)
    check(layer, random_x(6, 64, dtype), *route_randomly(6, 4, 2))


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(3, 2, 1), (16, 4, 8)], ids=str)
def test_tiers_of_any_bits_add_up(bits: tuple[int, ...], dtype: torch.dtype) -> None:
    counts = [(3, 40, 2), (0, 1, 0), (33, 0, 70), (0, 0, 0), (0, 0, 17)]
    layer = make_layer(counts, bits, dtype)
    check(layer, random_x(11, 64, dtype), *route_randomly(11, 5, 3))


@here
@pytest.mark.parametrize("d_model, group", [(96, 96), (96, 48), (160, 16), (128, 128), (256, 64)])
def test_groups_and_rows_of_any_length(d_model: int, group: int) -> None:
    layer = make_layer(
        [(3, 2, 1, 2, 1), (0, 18, 0, 1, 0)], (8, 4, 3, 2, 1), torch.float32, d_model, group
    )
    check(layer, random_x(3, d_model, torch.float32), *route_randomly(3, 2, 2))


@here
@pytest.mark.parametrize("bits", [16, 2])
def test_all_tokens_on_one_expert(bits: int) -> None:
    layer = make_layer([(5,), (37,), (4,)], [bits], torch.float32)
    ids = torch.full((40, 1), 1, dtype=torch.int32, device=DEVICE)
    check(layer, random_x(40, 64, torch.float32), torch.rand(40, 1, device=DEVICE), ids)


@here
@pytest.mark.parametrize("num_tokens", [6, 40])
def test_an_expert_may_be_named_more_than_once_by_a_token(num_tokens: int) -> None:
    layer = make_layer([(5,), (37,), (4,), (9,)] * 2, [16], torch.float32)
    ids = torch.ones(num_tokens, 4, dtype=torch.int32, device=DEVICE)
    weights = torch.rand(num_tokens, 4, device=DEVICE)
    check(layer, random_x(num_tokens, 64, torch.float32), weights, ids, small_tiles())


@here
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_ids_of_experts_held_elsewhere_add_nothing(num_tokens: int, id_dtype: torch.dtype) -> None:
    far = torch.iinfo(id_dtype).max
    ids = torch.tensor([[-1, 0], [1, 2], [-1, 7], [far, -far]], dtype=id_dtype, device=DEVICE)
    layer = make_layer([(20,), (4,)], [16], torch.float32)
    x, weights = random_x(4, 64, torch.float32), torch.rand(4, 2, device=DEVICE)
    for first in range(0, 4, num_tokens):
        part = slice(first, first + num_tokens)
        out = check(layer, x[part], weights[part], ids[part])
    assert out[-1].equal(torch.zeros_like(out[-1]))


def small_tiles(**changes: int) -> Tiles:
    row = {
        **HOPPER["dense"][min(HOPPER["dense"])],
        "rows": 16,
        "step": 32,
        "columns": 32,
        "down_step": 16,
    }
    return Tiles(**{**row, **changes})


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(16,), (3, 1)], ids=str)
def test_many_blocks_tiles_and_splits(bits: tuple[int, ...], dtype: torch.dtype) -> None:
    counts = [(70, 20)[: len(bits)], (3, 50)[: len(bits)], (0, 0)[: len(bits)]]
    layer, tiles = make_layer(counts, bits, dtype), small_tiles(programs=3)
    packed = pack_layer(deepcopy(layer), dtype)
    assert split_rows(packed, tiles, 4, 2, 16, torch.device("cpu")) < packed.most_rows
    check(layer, random_x(50, 64, dtype), *route_randomly(50, 3, 2), tiles)


@here
@pytest.mark.parametrize("parts", [2, 4])
def test_programs_share_the_columns_of_a_span(parts: int) -> None:
    counts = [(3, 40, 2, 5, 9, 1), (0, 1, 0, 18, 0, 2), (33, 0, 70, 1, 2, 3)]
    layer = make_layer(counts, (16, 8, 4, 3, 2, 1), torch.float32)
    tiles = small_tiles(down_parts=parts, programs=1)
    check(layer, random_x(9, 64, torch.float32), *route_randomly(9, 3, 2), tiles)


@here
@pytest.mark.parametrize(("num_tokens", "is_split"), [(1, True), (400, False)])
def test_rows_are_split_where_few_tokens_leave_programs_idle(
    num_tokens: int, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every split is another sum of each slot in memory: of a prompt's they would be gigabytes."""
    layer = pack_layer(make_layer([(70,)], [16], torch.float32), torch.float32)
    splits, kernel = [], moe_module.down

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(
                hidden: torch.Tensor, partial: torch.Tensor, *rest: Any, **more: Any
            ) -> None:
                splits.append(partial.shape[2])
                kernel[grid](hidden, partial, *rest, **more)

            return launch

    monkeypatch.setattr(moe_module, "down", Noted())
    monkeypatch.setattr(tiles_module, "_multiprocessors", lambda device: 1)
    ids = torch.zeros(num_tokens, 1, dtype=torch.int32, device=DEVICE)
    weights = torch.ones(num_tokens, 1, device=DEVICE)
    x, tiles = random_x(num_tokens, 64, torch.float32), small_tiles(programs=6)
    ragged_moe(x, weights, ids, layer, tiles)
    assert (splits[0] > 1) == is_split


@here
def test_the_result_is_the_same_every_time() -> None:
    layer = pack_layer(make_layer([(40, 7), (0, 30)], (16, 2), torch.float16), torch.float16)
    x, routing = random_x(20, 64, torch.float16), route_randomly(20, 2, 2)
    assert ragged_moe(x, *routing, layer).equal(ragged_moe(x, *routing, layer))


@here
def test_tokens_do_not_touch_each_other() -> None:
    layer = pack_layer(make_layer([(40,), (7,)], [16], torch.float32), torch.float32)
    x, (weights, ids) = random_x(20, 64, torch.float32), route_randomly(20, 2, 2)
    before, kept = x.clone(), ragged_moe(x, weights, ids, layer)
    assert x.equal(before)
    x[3] = float("nan")
    out = ragged_moe(x, weights, ids, layer)
    assert out[3].isnan().all()
    others = [token for token in range(20) if token != 3]
    assert out[others].equal(kept[others])


@here
def test_no_tokens_give_no_output() -> None:
    layer = pack_layer(make_layer([(4,)], [16], torch.float32), torch.float32)
    ids = torch.empty(0, 1, dtype=torch.int32, device=DEVICE)
    out = ragged_moe(random_x(0, 64, torch.float32), torch.empty(0, 1, device=DEVICE), ids, layer)
    assert out.shape == (0, 64)


@here
@pytest.mark.parametrize("num_slots", [24, 5000])
def test_slots_are_sorted_by_expert_in_order(num_slots: int) -> None:
    ids = torch.randint(-1, 6, (num_slots // 2, 2), dtype=torch.int32, device=DEVICE)
    slots = route(ids, num_experts=5)
    assert not slots.direct
    for expert in range(5):
        first, last = slots.starts[expert : expert + 2].tolist()
        assert slots.order[first:last].equal(torch.where(ids.flatten() == expert)[0].int())


@here
def test_few_slots_are_not_sorted() -> None:
    ids = torch.tensor([[3, 90]], dtype=torch.int32, device=DEVICE)
    assert route(ids, num_experts=128).direct
    assert not route(ids.expand(17, 2).contiguous(), num_experts=128).direct


@here
def test_an_expert_with_many_slots_is_done_all_the_same() -> None:
    layer, tiles = make_layer([(20,)] * 16, [16], torch.float32), small_tiles()
    ids = torch.full((100, 1), 5, dtype=torch.int32, device=DEVICE)
    packed = pack_layer(layer, torch.float32)
    assert side_by_side(packed, tiles, num_tokens=100, num_slots=100) * tiles.block < 100
    check(layer, random_x(100, 64, torch.float32), torch.rand(100, 1, device=DEVICE), ids, tiles)


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [(16,), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 1000])
def test_a_cuda_graph_replays_it(
    num_tokens: int, bits: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 200, (16, len(bits)), generator=generator).tolist()
    layer = make_layer(counts, bits, dtype, d_model=512, group=128)
    packed = pack_layer(deepcopy(layer), dtype)
    x, (weights, ids) = random_x(num_tokens, 512, dtype), route_randomly(num_tokens, 16, 4)
    ragged_moe(x, weights, ids, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ragged_moe(x, weights, ids, packed)
    for _ in range(3):
        x.copy_(random_x(num_tokens, 512, dtype))
        fresh_weights, fresh_ids = route_randomly(num_tokens, 16, 4)
        weights.copy_(fresh_weights)
        ids.copy_(fresh_ids)
        out.fill_(float("nan"))
        graph.replay()
        wanted = expected(x, weights, ids, layer)
        assert (out.double() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]
        assert out.equal(ragged_moe(x, weights, ids, packed))


@GPU
@pytest.mark.parametrize("kind, bits", [("dense", (16,)), ("packed", (3, 2, 1))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_row_of_the_table_computes_the_same(
    kind: str, bits: tuple[int, ...], dtype: torch.dtype
) -> None:
    counts = [tuple(100 + 37 * e + t for t in range(len(bits))) for e in range(4)]
    layer = make_layer(counts, bits, dtype, d_model=1024, group=128)
    x, routing = random_x(300, 1024, dtype), route_randomly(300, 4, 2)
    for row in TABLES[matrix_unit(x.device)][kind].values():
        check(layer, x, *routing, Tiles(**row))


def test_the_table_is_chosen_from_by_slots_per_expert() -> None:
    layer = pack_layer(tiny_dense_layer(), torch.float32)
    x, bounds = torch.empty(1, dtype=torch.float16), sorted(HOPPER["dense"])
    for bound in bounds:
        assert choose(layer, bound * layer.num_experts, x) == Tiles(**HOPPER["dense"][bound])
    assert choose(layer, 10**6, x) == Tiles(**HOPPER["dense"][bounds[-1]])
    assert choose(layer, 10**6, x.float()) == Tiles(**HOPPER["dense"][bounds[0]])


def test_powers_of_two_meet_every_row_of_the_table() -> None:
    for kind in (kind for table in TABLES.values() for kind in table.values()):
        bounds = sorted(kind)
        assert all(after >= 2 * before for before, after in pairwise(bounds))


class OnCard:
    """Stands for a tensor on a GPU, of which only this is asked."""

    is_cuda, device = True, torch.device("cuda", 7)

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize(
    "unit, shared_memory, holds_all",
    [
        ("mma.sync", 101376, True),
        ("mma.sync", 166912, True),
        ("wgmma", 101376, False),
        ("wgmma", 232448, True),
        ("tcgen05", 232448, True),
    ],
    ids=["L40", "A100", "small", "H200", "B200"],
)
def test_tiles_fit_into_a_card_s_shared_memory(
    kind: str, unit: str, shared_memory: int, holds_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "_shared_memory", lambda device: shared_memory)
    monkeypatch.setattr(tiles_module, "matrix_unit", lambda device: unit)
    layer = pack_layer(tiny_dense_layer(), torch.float32)
    if kind == "packed":
        tiers = tuple(replace(tier, bits=3) for tier in layer.tiers)
        layer = replace(layer, tiers=tiers, d_model=2048, group_size=128)
    for bound, row in TABLES[unit][kind].items():
        tiles, wanted = choose(layer, bound * layer.num_experts, OnCard()), Tiles(**row)
        assert tiles.stages >= 2 and tiles.down_stages >= 2
        dense_bytes = tiles.stages * (2 * tiles.rows + tiles.block) * tiles.step * 2
        down_bytes = tiles.down_stages * (tiles.columns + tiles.block) * tiles.down_step * 2
        assert max(dense_bytes, down_bytes) <= shared_memory
        if holds_all:
            assert replace(tiles, stages=0, down_stages=0) == replace(
                wanted, stages=0, down_stages=0
            )
        if unit == "wgmma" and holds_all:
            assert tiles == wanted


@pytest.mark.parametrize(
    "capability, unit",
    [
        ((8, 0), "mma.sync"),
        ((8, 9), "mma.sync"),
        ((9, 0), "wgmma"),
        ((10, 3), "tcgen05"),
        ((12, 0), "mma.sync"),
    ],
)
def test_every_generation_of_gpus_has_its_table(
    capability: tuple[int, int], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert matrix_unit.__wrapped__(torch.device("cuda", 3)) == unit
    assert set(TABLES[unit]) == {"dense", "packed"}


@pytest.mark.parametrize(
    "programs, at_once, steps_of_sums, splits",
    [
        # 32 of 132 run at once either way: fewer steps each, until starting takes longer.
        (32, 396, 2, 12),
        # Twice as many programs in three rounds, each of half as many steps as before in two.
        (504, 396, 2, 2),
        # Rounds are many: what a program costs besides its steps counts most.
        (4096, 264, 8, 1),
    ],
)
def test_experts_are_split_as_long_as_it_ends_earlier(
    programs: int, at_once: int, steps_of_sums: int, splits: int
) -> None:
    found = tiles_module._steps_of_a_split(24, programs, at_once, steps_of_sums)
    assert -(-24 // found) == splits


def test_tiers_with_the_same_columns_are_added_up_together() -> None:
    layer = replace(pack_layer(tiny_dense_layer(), torch.float32), d_model=2048, group_size=128)
    tiers = tuple(replace(layer.tiers[0], bits=bits) for bits in (16, 8, 4, 3, 2, 1))
    assert bundles(replace(layer, tiers=tiers), small_tiles(columns=96, down_parts=4)) == (
        (0, 1, 1, 96, 22, 1),
        (1, 2, 2, 64, 32, 2),
        (2, 3, 4, 64, 32, 4),
        (3, 6, 8, 64, 16, 4),
    )


def tiny_dense_layer() -> RaggedLayer:
    rows = [torch.zeros(4, 64) for _ in range(3)]
    return RaggedLayer((RaggedTier(*rows, offsets=(0, 1, 4)),))


class Launches:
    """Stands for a kernel, and notes what it would be compiled for."""

    def __init__(self, name: str, seen: set[tuple[object, ...]]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *tensors, **constants: self.seen.add((self.name, *constants.items()))


@pytest.mark.parametrize("plan", ["16:0.6,0:0.4", "3:0.2,2:0.6,1:0.2", "16:0.1,4:0.5,2:0.4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("unit", TABLES)
def test_powers_of_two_meet_every_kernel_that_any_number_of_tokens_needs(
    unit: str, shape: Shape, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the plugin compiles them before requests come."""
    seen: set[tuple[object, ...]] = set()
    for module, name in [(moe_module, n) for n in ("gate_up", "down", "add_up")] + [
        (routing_module, "_route")
    ]:
        monkeypatch.setattr(module, name, Launches(name, seen))
    monkeypatch.setattr(tiles_module, "matrix_unit", lambda device: unit)
    layer = layer_of_counts(shape, TierPlan.parse(plan))

    def run(count: int) -> None:
        x = torch.empty(count, shape.d_model, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(count, shape.top_k, dtype=torch.int32, device="meta")
        ragged_moe(x, ids, ids, layer)

    for power in range(14):
        run(2**power)
    before = set(seen)
    for count in (*range(1, 300), *range(300, 8192, 113)):
        run(count)
    assert seen == before


def layer_of_counts(shape: Shape, plan: TierPlan) -> TritonLayer:
    """A layer as wide as the plan leaves it, without weights."""
    counts = torch.tensor(layer_counts(shape, plan, seed=0).experts).T
    empty = torch.empty(0, device="meta")
    return TritonLayer(
        tiers=tuple(TritonTier(bits, *[empty] * 6) for bits in plan.bits),
        offsets=empty,
        tile_lists=tuple(torch.empty(1000, 2, device="meta") for _ in layout.TILE_ROWS),
        num_experts=shape.num_experts,
        d_model=shape.d_model,
        group_size=128,
        most_rows=int(counts.max()),
        width=layout.width_of(counts),
    )
