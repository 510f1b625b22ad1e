"""What a compression will write, hold and take, for `--dry-run` and the disk check."""

import math
import time
from collections import Counter
from typing import Literal

import torch

from camera_serve.calibration.streaming import TOKENS_PER_BATCH, layers_at_once
from camera_serve.checkpoint.entries import DTYPES
from camera_serve.checkpoint.format import check_groups
from camera_serve.checkpoint.kept import kept_in_fp8, saved_bytes
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.report import StoredOriginal
from camera_serve.compression.quantize.cost import SolveSize, solve_seconds
from camera_serve.models import MoeStructure
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layout import check_alignment, tier_totals
from camera_serve.ragged.packing import words_per_row
from camera_serve.ranking.energy import ROWS_AT_ONCE
from camera_serve.ranking.gram import WIDEST
from camera_serve.recipe import Recipe, Settings
from camera_serve.runtime import compute_dtype

GRAMS = 8
"""Matrices of an expert's width that elimination holds at a time, of float64."""

SURVEYED = 24
"""Bytes on disk of what a survey finds of a micro-expert: energy, order and cost."""

DECODING = 16
"""Bytes that a weight takes at most while it is decoded: its codes as integers, in float32, and in
the dtype of the model."""


class Estimate(Settings):
    """Bytes are exact for the output, upper estimates for memory; seconds are a rough guide.

    Memory is what a run takes beside Python and torch, a GPU's included. Parts of the peak:
    `layer_bytes`, the largest decoder layer in the dtype of the run; `mapped_bytes`, the same in
    the model's files, whose pages the system may take back, both for each of `layers_at_once`;
    `decoding_bytes`, the largest weight while it is decoded, 0 where none is stored quantized;
    `tier_bytes`, a layer's experts as they will be stored; `solver_bytes`, the solves of
    `experts_at_once` of a layer's `num_experts` experts (both 0 where nothing is packed).
    """

    output_bytes: int
    expert_bytes_before: int
    expert_bytes_after: int
    total_bytes_before: int
    disk_bytes: int
    peak_memory_bytes: int
    layer_bytes: int
    mapped_bytes: int
    layers_at_once: int
    decoding_bytes: int
    tier_bytes: int
    solver_bytes: int
    experts_at_once: int
    num_experts: int
    calibration_tokens: int
    seconds: float
    stored: StoredOriginal | None = None


def check_fits(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a recipe that this model cannot follow, with a setting that it can.

    Raises `RecipeError` or `CheckpointError`.
    """
    structure = checkpoint.structure
    shared = [structure.shared_d_ff] if structure.shared_d_ff else []
    check_alignment([structure.d_ff, *shared], recipe.align)
    check_groups(structure.d_model, recipe.group_size, recipe.plan.bits)
    tier_totals(recipe.plan, structure.micro_experts_per_layer, recipe.align)


def estimate_for(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> Estimate:
    """Sizes from the headers alone; the time from short products and solves on `device`."""
    check_fits(checkpoint, recipe)
    structure, tokens = checkpoint.structure, recipe.calibration.num_tokens
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    tiers, mapped = _tier_bytes(checkpoint, recipe), _largest_layer(checkpoint, "stored_bytes")
    layer = _largest_layer(checkpoint, "num_bytes") * dtype.itemsize // checkpoint.dtype.itemsize
    decoding = _decoding_bytes(checkpoint)
    solves = _solves(structure, recipe)
    solver = max((size.peak_bytes(tokens) for size in solves), default=0)
    held = layers_at_once(device) * (layer + mapped)
    batch = max(_batch_bytes(structure, recipe), ROWS_AT_ONCE * structure.d_model * 8)
    batch = max(batch, _gram_bytes(structure, recipe))
    return Estimate(
        output_bytes=_output_bytes(checkpoint, recipe),
        expert_bytes_before=checkpoint.expert_bytes,
        expert_bytes_after=_stored_bytes(checkpoint, recipe),
        total_bytes_before=checkpoint.total_bytes,
        disk_bytes=disk_bytes(checkpoint, recipe),
        # A layer writes its output over its input. Beside it lies what its experts are given while
        # they are packed, then the output once more if safetensors copies what it saves.
        peak_memory_bytes=held
        + tiers
        + max(solver, batch, decoding)
        + 2 * _hidden_bytes(checkpoint, recipe),
        layer_bytes=layer,
        mapped_bytes=mapped,
        layers_at_once=layers_at_once(device),
        decoding_bytes=decoding,
        tier_bytes=tiers,
        solver_bytes=solver,
        experts_at_once=solves[0].experts_at_once if solves else 0,
        num_experts=structure.num_experts,
        calibration_tokens=tokens,
        seconds=_seconds(structure, recipe, dtype, device),
        stored=checkpoint.stored,
    )


def disk_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Disk space a compression needs at its peak."""
    # The activations are on disk twice for a moment: the new ones, then the rename.
    hidden = 2 * _hidden_bytes(checkpoint, recipe)
    if recipe.budget == "layer":
        return _output_bytes(checkpoint, recipe) + hidden
    structure = checkpoint.structure
    surveyed = len(structure.moe_layers) * structure.micro_experts_per_layer * SURVEYED
    return _output_bytes(checkpoint, recipe) + 2 * hidden + surveyed


def _output_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    after = _stored_bytes(checkpoint, recipe)
    kept = kept_in_fp8(checkpoint) if recipe.keep_fp8 else None
    return checkpoint.total_bytes - checkpoint.expert_bytes - saved_bytes(checkpoint, kept) + after


def _stored_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Stored bytes of all experts, exactly."""
    structure = checkpoint.structure
    if recipe.budget == "layer":
        return _tier_bytes(checkpoint, recipe) * len(structure.moe_layers)
    whole = len(structure.moe_layers) * structure.micro_experts_per_layer
    return _tier_bytes(checkpoint, recipe, whole)


def _tier_bytes(checkpoint: Checkpoint, recipe: Recipe, micro_experts: int | None = None) -> int:
    """Stored bytes of so many micro-experts, exactly; None: those of a MoE layer."""
    count = micro_experts or checkpoint.structure.micro_experts_per_layer
    totals = tier_totals(recipe.plan, count, recipe.align)
    return sum(
        count * _micro_expert_bytes(checkpoint, bits, recipe.group_size)
        for bits, count in totals.items()
    )


def _micro_expert_bytes(checkpoint: Checkpoint, bits: int, group_size: int) -> int:
    """Stored bytes of one micro-expert's three vectors, scales and zeros counted."""
    structure = checkpoint.structure
    if bits == 16:
        name = f"{structure.expert_prefix(structure.moe_layers[0], 0, 'gate')}.weight"
        itemsize = DTYPES[checkpoint.entries[name].dtype].itemsize
        return len(PROJECTIONS) * structure.d_model * itemsize
    metadata = structure.d_model // group_size * 2 * torch.float16.itemsize
    return len(PROJECTIONS) * (4 * words_per_row(structure.d_model, bits) + metadata)


def _hidden_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """The activations of all calibration tokens between two layers."""
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    return recipe.calibration.num_tokens * checkpoint.structure.d_model * dtype.itemsize


def _largest_layer(checkpoint: Checkpoint, size: Literal["num_bytes", "stored_bytes"]) -> int:
    """Bytes of the largest decoder layer, attention and router included."""
    layers: Counter[int] = Counter()
    for name, entry in checkpoint.entries.items():
        if (layer := checkpoint.structure.layer_number(name)) is not None:
            layers[layer] += getattr(entry, size)
    return max(layers.values())


def _decoding_bytes(checkpoint: Checkpoint) -> int:
    """The largest quantized weight of the original, while it is decoded."""
    coded = (entry for entry in checkpoint.entries.values() if entry.coding)
    return DECODING * max((math.prod(entry.shape) for entry in coded), default=0)


def _gram_bytes(structure: MoeStructure, recipe: Recipe) -> int:
    """Float64 matrices of the widest expert that has a Gram matrix, while it is taken apart."""
    widths = [d_ff for d_ff in (structure.d_ff, structure.shared_d_ff) if d_ff <= WIDEST]
    if not _has_grams(recipe) or not widths:
        return 0
    return GRAMS * 8 * max(widths) ** 2


def _has_grams(recipe: Recipe) -> bool:
    return recipe.refit or recipe.budget == "model"


def _batch_bytes(structure: MoeStructure, recipe: Recipe) -> int:
    """Float32 activations of one batch in the layer's experts."""
    at_once = max(TOKENS_PER_BATCH, recipe.calibration.seq_len)
    tokens = min(recipe.calibration.num_tokens, at_once)
    return tokens * structure.top_k * (structure.d_model + 3 * structure.d_ff) * 4


def _solves(structure: MoeStructure, recipe: Recipe, share: float = 1) -> list[SolveSize]:
    """The solves of a layer, of its routed experts first, when `share` of an expert is packed."""
    if not recipe.plan.quantized:
        return []
    kinds = [(structure.num_experts, structure.d_ff)]
    kinds += [(1, structure.shared_d_ff)] if structure.shared_d_ff else []
    return [
        SolveSize(number, max(1, round(share * d_ff)), structure.d_model, recipe.group_size)
        for number, d_ff in kinds
    ]


def _seconds(
    structure: MoeStructure, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> float:
    tokens = recipe.calibration.num_tokens
    seconds = _flops(structure, recipe, tokens) / _flops_per_second(dtype, device)
    share = sum(tier.fraction for tier in recipe.plan.tiers if 0 < tier.bits < 16)
    solves = _solves(structure, recipe, share)
    rate = _flops_per_second(torch.float32, device) if solves else 0
    for size, seen in zip(solves, (tokens * structure.top_k, tokens), strict=False):
        each = seen / size.num_experts if recipe.solver == "gptq" else 0
        seconds += len(structure.moe_layers) * solve_seconds(size, each, rate, device)
    return seconds


def _flops(structure: MoeStructure, recipe: Recipe, tokens: int) -> float:
    """The attention, gate and up to measure, then all three of what is kept (Algorithm 2)."""
    routed = structure.top_k * structure.d_ff + structure.shared_d_ff
    attention = 2 * (4 * structure.d_model**2 + 2 * structure.d_model * recipe.calibration.seq_len)
    per_token = attention + 2 * routed * structure.d_model * (2 + 3 * (1 - recipe.plan.pruned))
    gram = 2 * (structure.top_k * structure.d_ff**2 + structure.shared_d_ff**2)
    if recipe.budget == "model":
        # The dense model once, its Gram matrices, and taking each expert apart.
        per_token += attention + 6 * routed * structure.d_model + gram
    if recipe.refit:
        per_token += gram
    return tokens * per_token * structure.num_layers


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    (square @ square).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        product = square @ square
    product.sum().item()
    return 3 * 2 * 1024**3 / (time.perf_counter() - start)
