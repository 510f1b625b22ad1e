"""One MoE layer: energies -> selection -> (quantized) tensors, and the experts that go on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from camera_serve.checkpoint.experts import packed_tensors
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.kernels import RaggedTier
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.quantize.experts import (
    InputRecorder,
    QuantizedExperts,
    QuantizedRows,
    RoutedInputs,
    every_token,
    quantize_experts,
)
from camera_serve.ranking import measure
from camera_serve.recipe import Recipe
from camera_serve.selection import LayerEnergies, Selection, select, select_rows
from camera_serve.streaming import ModelStream, StreamedLayer


@dataclass(frozen=True)
class CompressedLayer:
    """A MoE layer after compression.

    tensors: the expert tensors of the checkpoint, by name; loaded: the layer with the compressed
    experts in place; rounded: routed experts that were rounded to nearest for want of tokens.
    """

    tensors: dict[str, torch.Tensor]
    loaded: StreamedLayer
    energies: LayerEnergies
    selection: Selection
    rounded: tuple[int, ...]


@torch.inference_mode()
def compress_layer(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor, recipe: Recipe
) -> CompressedLayer:
    """Algorithm 2, lines 5-13, and Algorithm 3, lines 3-14, for one MoE layer.

    hidden: `[samples, seq_len, d_model]`, the layer's input.
    """
    assert loaded.experts is not None
    recorder = InputRecorder() if recipe.plan.quantized else None
    energies = measure(stream, layer, loaded, hidden, recipe.alpha, recorder)
    selection = select(energies, recipe.plan, recipe.align)
    experts = select_rows(loaded.experts, selection.experts, stream.device)
    shared = _shared_rows(loaded.shared, selection, stream.device)
    codes = shared_codes = None
    if recorder:
        inputs = recorder.routed(stream.structure.num_experts)
        counts = selection.layout.experts
        experts, codes = _quantize(experts, counts, inputs, recipe, stream.device)
        if shared:
            counts, inputs = selection.layout.shared, every_token(inputs)
            shared, shared_codes = _quantize(shared, counts, inputs, recipe, stream.device)
    loaded.use_experts(experts)
    if shared:
        set_shared(loaded.shared, shared)
    tensors = _tensors(stream.checkpoint, layer, selection, recipe, codes, shared_codes)
    rounded = codes.rounded if codes else ()
    return CompressedLayer(tensors, replace(loaded, experts=experts), energies, selection, rounded)


def _shared_rows(
    shared: Any, selection: Selection, device: torch.device
) -> RaggedTier[torch.Tensor] | None:
    if shared is None:
        return None
    gate, up, down = shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T
    return select_rows(RaggedTier(gate, up, down, (0, len(gate))), selection.shared, device)


def set_shared(shared: Any, rows: RaggedTier[torch.Tensor]) -> None:
    """Give a shared expert's three linear layers the weights of `rows`, of any width."""
    for name, matrix in (("gate", rows.gate), ("up", rows.up), ("down", rows.down)):
        linear = getattr(shared, f"{name}_proj")
        weight = matrix.T if name == "down" else matrix
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)


def _quantize(
    experts: RaggedTier[torch.Tensor],
    counts: Sequence[Sequence[int]],
    inputs: RoutedInputs,
    recipe: Recipe,
    device: torch.device,
) -> tuple[RaggedTier[torch.Tensor], QuantizedExperts]:
    """Quantize the packed tiers of some experts; returns the experts as they will be served."""
    bits = torch.tensor(recipe.plan.bits)
    row_bits = torch.cat([bits.repeat_interleave(torch.tensor(tiers)) for tiers in counts])
    codes = quantize_experts(
        experts,
        row_bits,
        inputs,
        group_size=recipe.group_size,
        solver=recipe.solver,
        device=device,
    )
    packed = (row_bits < 16).to(device)

    def served(matrix: torch.Tensor, rows: QuantizedRows) -> torch.Tensor:
        weights = matrix.clone()
        weights[packed] = rows.dequantize().to(weights)
        return weights

    gate, up = served(experts.gate, codes.gate), served(experts.up, codes.up)
    return RaggedTier(gate, up, served(experts.down, codes.down), experts.offsets), codes


def _tensors(
    checkpoint: Checkpoint,
    layer: int,
    selection: Selection,
    recipe: Recipe,
    codes: QuantizedExperts | None,
    shared_codes: QuantizedExperts | None,
) -> dict[str, torch.Tensor]:
    """What the checkpoint holds of the layer's experts, tensor by tensor."""
    structure = checkpoint.structure
    tensors: dict[str, torch.Tensor] = {}
    for projection in PROJECTIONS:
        for expert, rows in enumerate(selection.experts):
            prefix = structure.expert_prefix(layer, expert, projection)
            counts = selection.layout.experts[expert]
            own = _expert_rows(codes, projection, expert)
            tensors |= _projection(checkpoint, prefix, projection, rows, counts, own, recipe)
        for rows, counts in zip(selection.shared, selection.layout.shared, strict=True):
            prefix = structure.shared_prefix(layer, projection)
            own = _expert_rows(shared_codes, projection, 0)
            tensors |= _projection(checkpoint, prefix, projection, rows, counts, own, recipe)
    checkpoint.release()
    return tensors


def _projection(
    checkpoint: Checkpoint,
    prefix: str,
    projection: Projection,
    kept: torch.Tensor,
    counts: Sequence[int],
    codes: QuantizedRows | None,
    recipe: Recipe,
) -> dict[str, torch.Tensor]:
    plain = counts[0] if recipe.plan.bits[0] == 16 else 0
    tensors = {}
    if plain:
        stored = checkpoint.get(f"{prefix}.weight")
        rows = stored.index_select(int(projection == "down"), kept[:plain])
        tensors[f"{prefix}.weight"] = rows
    if codes:
        packed = counts[len(counts) - len(recipe.plan.quantized) :]
        tensors |= packed_tensors(prefix, codes, packed, recipe.plan.quantized)
    return tensors


def _expert_rows(
    codes: QuantizedExperts | None, projection: Projection, expert: int
) -> QuantizedRows | None:
    if codes is None:
        return None
    own = slice(codes.offsets[expert], codes.offsets[expert + 1])
    rows: QuantizedRows = getattr(codes, projection)
    return QuantizedRows(rows.codes[own], rows.scales[own], rows.zeros[own])
