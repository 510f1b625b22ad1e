"""The ragged MoE layer in four launches: routing, gate and up, down, the sum of the parts."""

# Triton has no types.
# mypy: disable-error-code="import-untyped"

import torch
import triton

from camera_serve.kernels.triton.down import add_up, down
from camera_serve.kernels.triton.gate_up import gate_up
from camera_serve.kernels.triton.layout import TILE_ROWS, TritonLayer
from camera_serve.kernels.triton.routing import Slots, route
from camera_serve.kernels.triton.tiles import (
    Bundles,
    Tiles,
    bundles,
    choose,
    lengths,
    most_tiles,
    side_by_side,
    split_rows,
)

_SUM_TILE = 8192
_MOST_AT_ONCE = 128
_AT_ONCE_OF_SPLITS = 64
_LEAST_COLUMNS, _MOST_COLUMNS = 64, 1024


def ragged_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    layer: TritonLayer,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`kernels.ragged_moe` on a packed layer: the same arguments and result, deterministic.

    Launches and shapes depend on shapes alone, so it runs inside CUDA graphs. x: on torch's current
    device, of the dtype that `pack_layer` was given. tiles: instead of the table's.
    """
    num_tokens, top_k = top_k_ids.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0 or layer.most_rows == 0:
        return out.zero_()
    tiles = tiles or choose(layer, num_tokens * top_k, x)
    ids = top_k_ids.contiguous()
    slots = route(ids, layer.num_experts)
    hidden = x.new_empty(num_tokens * top_k, layer.width)
    _gate_up(x.contiguous(), hidden, top_k_weights.contiguous(), ids, slots, layer, tiles)
    _down(hidden, out, ids, slots, layer, tiles)
    return out


def _gate_up(
    x: torch.Tensor,
    hidden: torch.Tensor,
    top_k_weights: torch.Tensor,
    ids: torch.Tensor,
    slots: Slots,
    layer: TritonLayer,
    tiles: Tiles,
) -> None:
    tile_list = layer.tile_lists[TILE_ROWS.index(tiles.rows)]
    programs, together = len(tile_list), side_by_side(layer, tiles, len(ids), ids.numel())
    if slots.direct:
        programs, together = ids.numel(), most_tiles(layer, tiles.rows)
    gate_up[(programs * together,)](
        x,
        hidden,
        top_k_weights,
        ids,
        slots.order,
        slots.starts,
        layer.offsets,
        tile_list,
        tuple((t.gate, t.up, t.gate_grid, t.up_grid) for t in layer.tiers),
        together,
        layer.width,
        TIERS=tuple(zip((tier.bits for tier in layer.tiers), lengths(layer), strict=True)),
        TOP_K=ids.shape[1],
        NUM_EXPERTS=layer.num_experts,
        D_MODEL=layer.d_model,
        GROUP_SIZE=layer.group_size,
        BLOCK=tiles.block,
        ROWS=tiles.rows,
        STEP=tiles.step,
        DIRECT=slots.direct,
        PTX=_has_ptx(x),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )


def _down(
    hidden: torch.Tensor,
    out: torch.Tensor,
    ids: torch.Tensor,
    slots: Slots,
    layer: TritonLayer,
    tiles: Tiles,
) -> None:
    bundled = bundles(layer, tiles)
    units = sum(programs for *_, programs, _ in bundled)
    works, together = layer.num_experts, side_by_side(layer, tiles, len(ids), ids.numel())
    if slots.direct:
        works, together = len(hidden), 1
    active = min(works, len(hidden)) * together
    rows = split_rows(layer, tiles, active, units, len(hidden) / active, hidden.device)
    splits = max(1, -(-layer.most_rows // rows))
    partial = hidden.new_empty(len(hidden), len(bundled), splits, layer.d_model)
    down[(works * together * units * splits,)](
        hidden,
        partial,
        ids,
        slots.order,
        slots.starts,
        layer.offsets,
        tuple((t.down, t.down_grid) for t in layer.tiers),
        splits,
        rows,
        together,
        layer.width,
        BITS=tuple(tier.bits for tier in layer.tiers),
        BUNDLES=bundled,
        UNITS=units,
        MOST_PARTS=tiles.down_parts,
        NUM_EXPERTS=layer.num_experts,
        D_MODEL=layer.d_model,
        GROUP_SIZE=layer.group_size,
        BLOCK=tiles.block,
        STEP=tiles.down_step,
        DIRECT=slots.direct,
        PTX=_has_ptx(hidden),
        num_warps=tiles.down_warps,
        num_stages=tiles.down_stages,
        maxnreg=tiles.down_registers,
    )
    _add_up(partial, out, ids, layer, rows, bundled)


def _add_up(
    partial: torch.Tensor,
    out: torch.Tensor,
    ids: torch.Tensor,
    layer: TritonLayer,
    rows: int,
    bundled: Bundles,
) -> None:
    """All of a token's shares at once where they fit: one wait for memory, not one for each.

    Two kernels in all, one where rows are split: neither is met for the first time by a request.
    """
    _, num_bundles, splits, d_model = partial.shape
    shares = triton.next_power_of_2(ids.shape[1] * num_bundles)
    at_once = min(_MOST_AT_ONCE, shares) if splits == 1 else _AT_ONCE_OF_SPLITS
    columns = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, _SUM_TILE // at_once))
    add_up[(len(out), -(-d_model // columns))](
        partial,
        out,
        ids,
        layer.offsets,
        splits,
        rows,
        NUM_BUNDLES=num_bundles,
        BUNDLE_OF=tuple(
            b for b, (first, stop, *_) in enumerate(bundled) for _ in range(first, stop)
        ),
        TOP_K=ids.shape[1],
        NUM_EXPERTS=layer.num_experts,
        D_MODEL=d_model,
        COLUMNS=columns,
        AT_ONCE=at_once,
    )


def _has_ptx(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and x.dtype != torch.float32
