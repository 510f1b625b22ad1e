"""What a compression will write, hold and take, for `--dry-run` and the disk check."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from camera_serve.calibration.streaming import TOKENS_PER_BATCH, layers_at_once
from camera_serve.checkpoint.entries import DTYPES
from camera_serve.checkpoint.format import check_groups
from camera_serve.checkpoint.kept import kept_in_fp8, saved_bytes
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.report import StoredOriginal
from camera_serve.compression.allocation import (
    check_leaves_enough,
    expected_loss,
    fill,
    least_bytes,
    select_over_model,
    with_predictions,
)
from camera_serve.compression.quantize.cost import SolveSize, solve_seconds
from camera_serve.errors import RecipeError
from camera_serve.models import MoeStructure
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layout import check_alignment, tier_totals
from camera_serve.ragged.packing import words_per_row
from camera_serve.ranking.energy import ROWS_AT_ONCE
from camera_serve.ranking.gram import WIDEST
from camera_serve.ranking.selection import Selection
from camera_serve.ranking.survey import LayerSurvey, surveyed_share
from camera_serve.recipe import Recipe, Settings, TierPlan
from camera_serve.runtime import compute_dtype

GRAMS = 8
"""Matrices of an expert's width that elimination holds at a time, of float64."""

SURVEYED = 32
"""Bytes on disk of what a survey finds of a micro-expert: energy, order, cost and norm."""

DECODING = 16
"""Bytes that a weight takes at most while it is decoded: its codes as integers, in float32, and in
the dtype of the model."""


class Allocation(Settings):
    """What a recipe gives the micro-experts of an analyzed model.

    micro_experts: how many at each bit-width, those removed at 0. expected_loss: see
    `camera_serve.compression.allocation.expected_loss`.
    """

    micro_experts: Mapping[int, int]
    expected_loss: float


class Estimate(Settings):
    """Bytes are exact for the output, upper estimates for memory; seconds are a rough guide.

    Memory is what a run takes beside Python and torch, a GPU's included. Parts of the peak:
    `layer_bytes`, the largest decoder layer in the dtype of the run; `mapped_bytes`, the same in
    the model's files, whose pages the system may take back, both for each of `layers_at_once`;
    `decoding_bytes`, the largest weight while it is decoded, 0 where none is stored quantized;
    `tier_bytes`, a layer's experts as they will be stored; `solver_bytes`, the solves of
    `experts_at_once` of a layer's `num_experts` experts (both 0 where nothing is packed).

    Of a size, the output takes up to `spare_bytes` less than is said, until an `allocation` is
    known.
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
    spare_bytes: int = 0
    allocation: Allocation | None = None


def check_fits(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a recipe that this model cannot follow, with a setting that it can.

    Raises `RecipeError` or `CheckpointError`.
    """
    structure = checkpoint.structure
    shared = [structure.shared_d_ff] if structure.shared_d_ff else []
    check_alignment([structure.d_ff, *shared], recipe.align)
    check_groups(structure.d_model, recipe.group_size, recipe.bits)
    counts = [structure.micro_experts_per_layer] * len(structure.moe_layers)
    if recipe.plan and recipe.budget == "model":
        check_leaves_enough(recipe.plan, counts, recipe.align)
    elif recipe.plan:
        tier_totals(recipe.plan, counts[0], recipe.align)
    else:
        _check_budget(checkpoint, recipe)


def micro_expert_costs(checkpoint: Checkpoint, recipe: Recipe) -> dict[int, int]:
    """Stored bytes of one micro-expert at each bit-width that the recipe allows."""
    return {bits: _micro_expert_bytes(checkpoint, bits, recipe.group_size) for bits in recipe.allow}


def allocate(
    checkpoint: Checkpoint, recipe: Recipe, surveys: Sequence[LayerSurvey]
) -> list[Selection]:
    """The micro-experts that a recipe keeps of each MoE layer, from a survey of all of them."""
    surveys = _ranked(recipe, surveys)
    if recipe.plan is None:
        costs = micro_expert_costs(checkpoint, recipe)
        found = fill(surveys, costs, expert_budget(checkpoint, recipe), recipe.align)
    elif recipe.budget == "model":
        found = select_over_model(surveys, recipe.plan, recipe.align)
    else:
        found = [select_over_model([own], recipe.plan, recipe.align)[0] for own in surveys]
    return with_predictions(surveys, found)


def allocation_for(
    checkpoint: Checkpoint, recipe: Recipe, surveys: Sequence[LayerSurvey]
) -> Allocation:
    """What `allocate` gives, in figures."""
    selections = allocate(checkpoint, recipe, surveys)
    found = dict.fromkeys((*recipe.bits, 0), 0)
    for selection in selections:
        for tiers in (*selection.layout.experts, *selection.layout.shared):
            for bits, count in zip(selection.bits, tiers, strict=True):
                found[bits] += count
    structure = checkpoint.structure
    every = len(structure.moe_layers) * structure.micro_experts_per_layer
    found[0] = every - sum(found.values())
    return Allocation(micro_experts=found, expected_loss=expected_loss(surveys, selections))


def _ranked(recipe: Recipe, surveys: Sequence[LayerSurvey]) -> list[LayerSurvey]:
    """Surveys without the elimination that a recipe does not ask for, and they may have."""
    return [survey if recipe.eliminates else survey.by_energy() for survey in surveys]


def expert_budget(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of all experts that a recipe's size leaves them."""
    if recipe.size is not None:
        return recipe.size - _bytes_outside(checkpoint, recipe)
    assert recipe.bits_per_weight
    structure = checkpoint.structure
    count = len(structure.moe_layers) * structure.micro_experts_per_layer
    return int(recipe.bits_per_weight / 8 * count * len(PROJECTIONS) * structure.d_model)


def _check_budget(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a size that the allowed bit-widths cannot fill, or that is none."""
    costs, structure = micro_expert_costs(checkpoint, recipe), checkpoint.structure
    counts = [structure.micro_experts_per_layer] * len(structure.moe_layers)
    least = least_bytes(counts, costs, recipe.align)
    most = max(costs.values()) * sum(counts)
    budget, outside = expert_budget(checkpoint, recipe), _bytes_outside(checkpoint, recipe)
    whole = f"this model's experts take {_size(checkpoint.expert_bytes)}, all else {_size(outside)}"
    allowed = ",".join(map(str, recipe.allow))
    if budget < least:
        raise RecipeError(
            f"{_goal(recipe, budget)} is too small: {whole}, and with bits {allowed} the experts "
            f"take {_size(least)} at least: give {_goal_for(checkpoint, recipe, least)} or more"
        )
    if budget >= most and 16 in costs:
        raise RecipeError(f"{_goal(recipe, budget)} is no compression: {whole}")
    if budget > most:
        raise RecipeError(
            f"{_goal(recipe, budget)} is more than bits {allowed} take, {_size(most)}: {whole}; "
            f"allow more bits, or give {_goal_for(checkpoint, recipe, most, math.floor)} or less"
        )


def _goal(recipe: Recipe, budget: int) -> str:
    if recipe.size is not None:
        left = f"of which {_size(max(budget, 0))} are left for experts,"
        return f"a size of {_size(recipe.size)}, {left}"
    return f"{recipe.bits_per_weight:g} bits per weight, {_size(budget)} for experts,"


def _goal_for(
    checkpoint: Checkpoint,
    recipe: Recipe,
    experts: int,
    rounded: Callable[[float], int] = math.ceil,
) -> str:
    """What to give in place of a recipe's size or bits, for experts of so many bytes."""
    if recipe.size is not None:
        return f"a size of {_size(_bytes_outside(checkpoint, recipe) + experts, rounded)}"
    structure = checkpoint.structure
    count = len(structure.moe_layers) * structure.micro_experts_per_layer
    bits = 8 * experts / (count * len(PROJECTIONS) * structure.d_model)
    return f"{rounded(1000 * bits) / 1000:g} bits per weight"


def _size(count: int, rounded: Callable[[float], int] = math.ceil) -> str:
    """Bytes as people read them, and as --size does: `11.502GiB`, or a plain number."""
    power = min((count.bit_length() - 1) // 10, 4)
    if power < 1:
        return str(count)
    return f"{rounded(1000 * count / 1024**power) / 1000:.7g}{'KMGT'[power - 1]}iB"


def estimate_for(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    allocation: Allocation | None = None,
) -> Estimate:
    """Sizes from the headers alone; the time from short products and solves on `device`.

    allocation: of an analysis, in whose place no survey is made.
    """
    check_fits(checkpoint, recipe)
    structure, tokens = checkpoint.structure, recipe.calibration.num_tokens
    dtype = compute_dtype(recipe.dtype, checkpoint.dtype)
    tiers, mapped = _layer_bytes(checkpoint, recipe), _largest_layer(checkpoint, "stored_bytes")
    layer = _largest_layer(checkpoint, "num_bytes") * dtype.itemsize // checkpoint.dtype.itemsize
    decoding = _decoding_bytes(checkpoint)
    solves = _solves(structure, recipe)
    solver = max((size.peak_bytes(tokens) for size in solves), default=0)
    held = layers_at_once(device) * (layer + mapped)
    batch = max(_batch_bytes(structure, recipe), ROWS_AT_ONCE * structure.d_model * 8)
    batch = max(batch, _gram_bytes(structure, recipe))
    experts, spare = _stored_bytes(checkpoint, recipe), 0
    if allocation:
        experts = _allocated_bytes(checkpoint, recipe, allocation)
    elif recipe.plan is None:
        spare = recipe.align * max(micro_expert_costs(checkpoint, recipe).values())
    return Estimate(
        output_bytes=_bytes_outside(checkpoint, recipe) + experts,
        expert_bytes_before=checkpoint.expert_bytes,
        expert_bytes_after=experts,
        total_bytes_before=checkpoint.total_bytes,
        disk_bytes=disk_bytes(checkpoint, recipe),
        # A layer writes its output over its input. Beside it lies what its experts are given while
        # they are packed, then the output once more if safetensors copies what it saves.
        peak_memory_bytes=held
        + tiers
        + max(solver, batch, decoding)
        + 2 * _hidden_bytes(checkpoint, recipe)
        + _swept_bytes(structure, recipe),
        layer_bytes=layer,
        mapped_bytes=mapped,
        layers_at_once=layers_at_once(device),
        decoding_bytes=decoding,
        tier_bytes=tiers,
        solver_bytes=solver,
        experts_at_once=solves[0].experts_at_once if solves else 0,
        num_experts=structure.num_experts,
        calibration_tokens=tokens,
        seconds=_seconds(checkpoint, recipe, dtype, device, surveyed=allocation is not None),
        stored=checkpoint.stored,
        spare_bytes=spare,
        allocation=allocation,
    )


def disk_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Disk space a compression needs at its peak."""
    # The activations are on disk twice for a moment: the new ones, then the rename. Those of a
    # survey are gone by the time that others come.
    hidden = 2 * _hidden_bytes(checkpoint, recipe)
    structure = checkpoint.structure
    surveyed = len(structure.moe_layers) * structure.micro_experts_per_layer * SURVEYED
    return _output_bytes(checkpoint, recipe) + hidden + (surveyed if recipe.surveys else 0)


def _output_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    return _bytes_outside(checkpoint, recipe) + _stored_bytes(checkpoint, recipe)


def _bytes_outside(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Stored bytes of all that is no expert, exactly."""
    kept = kept_in_fp8(checkpoint) if recipe.keep_fp8 else None
    return checkpoint.total_bytes - checkpoint.expert_bytes - saved_bytes(checkpoint, kept)


def _stored_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Stored bytes of all experts: exactly for a plan, and what a size leaves them at most."""
    structure = checkpoint.structure
    if recipe.plan is None:
        return expert_budget(checkpoint, recipe)
    layers = len(structure.moe_layers)
    if recipe.budget == "layer":
        return layers * _tier_bytes(checkpoint, recipe, recipe.plan)
    whole = layers * structure.micro_experts_per_layer
    return _tier_bytes(checkpoint, recipe, recipe.plan, whole)


def _allocated_bytes(checkpoint: Checkpoint, recipe: Recipe, allocation: Allocation) -> int:
    return sum(
        count * _micro_expert_bytes(checkpoint, bits, recipe.group_size)
        for bits, count in allocation.micro_experts.items()
    )


def _layer_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Stored bytes of a MoE layer's experts, on average over the layers of a size."""
    if recipe.plan:
        return _tier_bytes(checkpoint, recipe, recipe.plan)
    return expert_budget(checkpoint, recipe) // len(checkpoint.structure.moe_layers)


def _tier_bytes(
    checkpoint: Checkpoint, recipe: Recipe, plan: TierPlan, micro_experts: int | None = None
) -> int:
    """Stored bytes of so many micro-experts, exactly; None: those of a MoE layer."""
    count = micro_experts or checkpoint.structure.micro_experts_per_layer
    totals = tier_totals(plan, count, recipe.align)
    return sum(
        count * _micro_expert_bytes(checkpoint, bits, recipe.group_size)
        for bits, count in totals.items()
    )


def _micro_expert_bytes(checkpoint: Checkpoint, bits: int, group_size: int) -> int:
    """Stored bytes of one micro-expert's three vectors, scales and zeros counted."""
    structure = checkpoint.structure
    if not bits:
        return 0
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
    """Matrices of the widest expert that has a Gram matrix, while it is taken apart or refitted.

    Beside them lie the float32 ones of all of a layer's experts while they are surveyed.
    """
    kinds = ((structure.num_experts, structure.d_ff), (1, structure.shared_d_ff))
    squares = [(number, d_ff**2) for number, d_ff in kinds if 0 < d_ff <= WIDEST]
    if not squares or not (recipe.refit or recipe.eliminates):
        return 0
    each = GRAMS * 8 * max(square for _, square in squares)
    return each + recipe.eliminates * 4 * sum(number * square for number, square in squares)


def _swept_bytes(structure: MoeStructure, recipe: Recipe) -> int:
    """What a layer's experts gave every token, and what is left of them gives, in float32."""
    return 2 * 4 * recipe.calibration.num_tokens * structure.d_model if recipe.sweeps else 0


def _batch_bytes(structure: MoeStructure, recipe: Recipe) -> int:
    """Float32 activations of one batch in the layer's experts."""
    at_once = max(TOKENS_PER_BATCH, recipe.calibration.seq_len)
    tokens = min(recipe.calibration.num_tokens, at_once)
    return tokens * structure.top_k * (structure.d_model + 3 * structure.d_ff) * 4


def _solves(structure: MoeStructure, recipe: Recipe, share: float = 1) -> list[SolveSize]:
    """The solves of a layer, of its routed experts first, when `share` of an expert is packed."""
    if not recipe.packed:
        return []
    kinds = [(structure.num_experts, structure.d_ff)]
    kinds += [(1, structure.shared_d_ff)] if structure.shared_d_ff else []
    return [
        SolveSize(
            number,
            max(1, round(share * d_ff)),
            structure.d_model,
            recipe.group_size,
            recipe.polishes,
        )
        for number, d_ff in kinds
    ]


def _seconds(
    checkpoint: Checkpoint,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    *,
    surveyed: bool,
) -> float:
    structure, tokens = checkpoint.structure, recipe.calibration.num_tokens
    flops = _flops(checkpoint, recipe) + (0 if surveyed else _flops_of_survey(checkpoint, recipe))
    seconds = flops / _flops_per_second(dtype, device)
    share = _packed_share(checkpoint, recipe)
    solves = _solves(structure, recipe, share)
    rate = _flops_per_second(torch.float32, device) if solves else 0
    for size, seen in zip(solves, (tokens * structure.top_k, tokens), strict=False):
        each = seen / size.num_experts if recipe.solver == "gptq" else 0
        seconds += len(structure.moe_layers) * solve_seconds(size, each, rate, device)
    return seconds


def _flops(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """The attention, gate and up to measure, then all three of what is kept (Algorithm 2)."""
    structure = checkpoint.structure
    kept = 1 - recipe.plan.pruned if recipe.plan else _kept_share(checkpoint, recipe)
    routed = structure.top_k * structure.d_ff + structure.shared_d_ff
    per_token = _of_attention(checkpoint, recipe) + 2 * routed * structure.d_model * (2 + 3 * kept)
    if recipe.refit:
        per_token += _of_grams(structure)
    return recipe.calibration.num_tokens * per_token * structure.num_layers


def _flops_of_survey(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """The dense model's layers, and Gram matrices of their experts."""
    if not recipe.surveys:
        return 0
    structure = checkpoint.structure
    routed = structure.top_k * structure.d_ff + structure.shared_d_ff
    per_token = _of_attention(checkpoint, recipe) + 6 * routed * structure.d_model
    if recipe.eliminates:
        per_token += _of_grams(structure)
    seen = surveyed_share(structure, recipe) * recipe.calibration.num_tokens
    return seen * per_token * structure.num_layers


def _of_attention(checkpoint: Checkpoint, recipe: Recipe) -> int:
    d_model = checkpoint.structure.d_model
    return 2 * (4 * d_model**2 + 2 * d_model * recipe.calibration.seq_len)


def _of_grams(structure: MoeStructure) -> int:
    return 2 * (structure.top_k * structure.d_ff**2 + structure.shared_d_ff**2)


def _packed_share(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """The share of micro-experts that is packed; of a size, what it may be."""
    if recipe.plan:
        return sum(tier.fraction for tier in recipe.plan.tiers if 0 < tier.bits < 16)
    return _kept_share(checkpoint, recipe) if recipe.packed else 0.0


def _kept_share(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """About the share of micro-experts that a size leaves: few are at more bits than it affords."""
    costs = micro_expert_costs(checkpoint, recipe)
    if 0 not in costs:
        return 1.0
    affordable = expert_budget(checkpoint, recipe) / checkpoint.expert_bytes
    return min(1.0, affordable * 16 / min(b for b in costs if b))


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    (square @ square).sum().item()
    start = time.perf_counter()
    for _ in range(3):
        product = square @ square
    product.sum().item()
    return 3 * 2 * 1024**3 / (time.perf_counter() - start)
