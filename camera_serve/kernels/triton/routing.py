"""Which tokens each expert computes; the host never knows, as sizes depend on shapes alone."""

# Kernels take values of Triton, which has no types for them.
# mypy: disable-error-code="import-untyped, no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LONGEST_CHUNK = 4096


@dataclass(frozen=True)
class Slots:
    """Slots, which are pairs of a token and one of its experts, sorted by expert.

    order: int32 `[num_slots]`; starts: int32 `[num_experts + 1]`; expert e owns the positions
    `starts[e]:starts[e + 1]` of `order`. Slots of no expert come behind them all. With `direct`
    nothing was sorted: every slot is alone, and both are only there to be passed on.
    """

    order: torch.Tensor
    starts: torch.Tensor
    direct: bool


def route(top_k_ids: torch.Tensor, num_experts: int) -> Slots:
    """Sort the slots by expert, each expert's in their own order.

    top_k_ids: int `[num_tokens, top_k]`, contiguous. Few slots are not sorted: experts then hardly
    repeat, and it saves a launch.
    """
    num_slots = top_k_ids.numel()
    if top_k_ids.shape[0] == 1 or 4 * num_slots <= num_experts:
        return Slots(top_k_ids, top_k_ids, direct=True)
    order = top_k_ids.new_empty(num_slots, dtype=torch.int32)
    starts = top_k_ids.new_empty(num_experts + 1, dtype=torch.int32)
    chunk = min(_LONGEST_CHUNK, max(128, triton.next_power_of_2(num_slots)))
    _route[(num_experts,)](
        top_k_ids, order, starts, num_slots, CHUNK=chunk, num_warps=4 if chunk <= 1024 else 8
    )
    return Slots(order, starts, direct=False)


@triton.jit(do_not_specialize=["num_slots"])
def _route(ids, order, starts, num_slots, CHUNK: tl.constexpr):
    """One program for each expert: counts the slots before its own, then places its own."""
    expert = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    counts = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_slots, CHUNK):
        inside = start + lanes < num_slots
        found = tl.load(ids + start + lanes, mask=inside, other=-1)
        counts += ((found >= 0) & (found < expert)).to(tl.int32)
    before = tl.sum(counts)
    place = before
    for start in range(0, num_slots, CHUNK):
        inside = start + lanes < num_slots
        found = tl.load(ids + start + lanes, mask=inside, other=-1)
        is_mine = (found == expert).to(tl.int32)
        rank = tl.cumsum(is_mine) - 1
        tl.store(order + place + rank, start + lanes, mask=is_mine > 0)
        place += tl.sum(is_mine)
    tl.store(starts + expert, before)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)


@triton.jit
def alone(ids, slot, NUM_EXPERTS: tl.constexpr):
    """Expert of a slot that was not sorted, and its positions: none if it is no expert's."""
    found = tl.load(ids + slot)
    known = (found >= 0) & (found < NUM_EXPERTS)
    return tl.where(known, found, 0).to(tl.int32), slot, slot + known.to(tl.int32)
