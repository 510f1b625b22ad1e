"""What a compression will write, hold and take, for `--dry-run` and the disk check."""

import time

import torch

from camera_serve.checkpoint.format import check_groups
from camera_serve.checkpoint.reader import DTYPES, Checkpoint
from camera_serve.layout import check_alignment, tier_totals
from camera_serve.models import MoeStructure
from camera_serve.models.structure import PROJECTIONS
from camera_serve.quantize.experts import SOLVER_BYTES
from camera_serve.quantize.packing import words_per_row
from camera_serve.recipe import Recipe, Settings
from camera_serve.runtime import compute_dtype
from camera_serve.streaming import TOKENS_PER_BATCH


class Estimate(Settings):
    """Bytes are exact for the output, upper estimates for memory; seconds are a rough guide."""

    output_bytes: int
    expert_bytes_before: int
    expert_bytes_after: int
    total_bytes_before: int
    disk_bytes: int
    peak_memory_bytes: int
    calibration_tokens: int
    seconds: float


def estimate_for(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> Estimate:
    """Sizes from the headers alone; the time from a short matrix product on `device`."""
    structure = checkpoint.structure
    shared = [structure.shared_d_ff] if structure.shared_d_ff else []
    check_alignment([structure.d_ff, *shared], recipe.align)
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    check_groups(structure.d_model, recipe.group_size, recipe.plan.bits)
    totals = tier_totals(recipe.plan, structure.micro_experts_per_layer, recipe.align)
    each = {bits: micro_expert_bytes(checkpoint, bits, recipe.group_size) for bits in totals}
    per_layer = sum(count * each[bits] for bits, count in totals.items())
    after = per_layer * len(structure.moe_layers)
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    hidden = tokens * structure.d_model * dtype.itemsize
    output = checkpoint.total_bytes - checkpoint.expert_bytes + after
    return Estimate(
        output_bytes=output,
        expert_bytes_before=checkpoint.expert_bytes,
        expert_bytes_after=after,
        total_bytes_before=checkpoint.total_bytes,
        # The activations are on disk twice for a moment: the new ones, then the rename.
        disk_bytes=output + 2 * hidden,
        peak_memory_bytes=_peak_memory(checkpoint, recipe, dtype, hidden),
        calibration_tokens=tokens,
        seconds=_flops(structure, recipe, tokens) / _flops_per_second(dtype, device),
    )


def micro_expert_bytes(checkpoint: Checkpoint, bits: int, group_size: int) -> int:
    """Stored bytes of one micro-expert's three vectors, scales and zeros counted."""
    structure = checkpoint.structure
    if bits == 16:
        name = f"{structure.expert_prefix(structure.moe_layers[0], 0, 'gate')}.weight"
        itemsize = DTYPES[checkpoint.entries[name].dtype].itemsize
        return len(PROJECTIONS) * structure.d_model * itemsize
    metadata = structure.d_model // group_size * 2 * torch.float16.itemsize
    return len(PROJECTIONS) * (4 * words_per_row(structure.d_model, bits) + metadata)


def _peak_memory(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype, hidden: int) -> int:
    structure = checkpoint.structure
    weights = structure.micro_experts_per_layer * 3 * structure.d_model
    layer = weights * (2 * dtype.itemsize + 2)
    batch = TOKENS_PER_BATCH * structure.top_k * (structure.d_model + 3 * structure.d_ff) * 4
    solver = hidden + SOLVER_BYTES + weights if recipe.plan.quantized else 0
    return layer + 2 * hidden + batch + solver


def _flops(structure: MoeStructure, recipe: Recipe, tokens: int) -> float:
    """Two passes over the attention and gate/up, one over the kept down (Algorithm 2)."""
    routed = structure.top_k * structure.d_ff + structure.shared_d_ff
    attention = 2 * (4 * structure.d_model**2 + 2 * structure.d_model * recipe.calibration.seq_len)
    per_token = 2 * attention + 2 * routed * structure.d_model * (2 + 3 * (1 - recipe.plan.pruned))
    return tokens * per_token * structure.num_layers


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    (square @ square).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        product = square @ square
    product.sum().item()
    return 3 * 2 * 1024**3 / (time.perf_counter() - start)
