"""One MoE layer: energies -> selection -> (quantized) tensors, and the experts that go on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from camera_serve.calibration.inputs import InputRecorder, RoutedInputs, inputs_of_shared
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.checkpoint.experts import packed_tensors
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.compression.judging import Whole, judging_tokens, rows_of_shared
from camera_serve.compression.quantize.experts import quantize_experts
from camera_serve.compression.refit import Refitted, refit_experts
from camera_serve.compression.sweeps import fit_to_whole
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.layer import measure, record, scale_of_routed
from camera_serve.ranking.selection import Selection, chosen_anew, norms_of, select, select_rows
from camera_serve.recipe import Recipe

Fit = Callable[[RaggedTier[torch.Tensor], list[torch.Tensor]], Refitted]
"""Experts and which of their micro-experts are to stay -> those that do, and their down vectors."""


@dataclass(frozen=True)
class CompressedLayer:
    """A MoE layer after compression.

    tensors: the expert tensors of the checkpoint, by name; loaded: the layer with the compressed
    experts in place; tokens: int64 `[num_experts]`, routed to each; rounded: routed experts that
    were rounded to nearest for want of tokens; unfitted: those, the shared one last, whose new down
    vectors did not suit the tokens that were held back; uncompensated: the same of those that were
    to make up for quantizing; unpolished: those that keep GPTQ's codes; output_error: `Whole.error`
    of what is left, None where nothing was surveyed or fitted.
    """

    tensors: dict[str, torch.Tensor]
    loaded: StreamedLayer
    tokens: torch.Tensor
    selection: Selection
    rounded: tuple[int, ...]
    unfitted: tuple[int, ...]
    uncompensated: tuple[int, ...]
    unpolished: tuple[int, ...]
    output_error: float | None


@dataclass(frozen=True)
class _Kept:
    """The kept micro-experts of a layer's routed experts, or of its shared ones.

    rows: their weights in the dtype of the run; counts[e]: how many in each stored tier;
    prefix(e, projection): where the checkpoint has them; fitted: which they are, and what their
    down vectors have become.
    """

    rows: RaggedTier[torch.Tensor]
    counts: tuple[tuple[int, ...], ...]
    prefix: Callable[[int, Projection], str]
    fitted: Refitted


class _Quantized(NamedTuple):
    """The packed tensors of a layer's experts by name, and what `QuantizedExpert` says of them."""

    tensors: dict[str, torch.Tensor]
    rounded: tuple[int, ...]
    uncompensated: tuple[int, ...]
    unpolished: tuple[int, ...]


@torch.inference_mode()
def compress_layer(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    recipe: Recipe,
    selection: Selection | None = None,
) -> CompressedLayer:
    """Algorithm 2, lines 5-13, and Algorithm 3, lines 3-14, for one MoE layer.

    hidden: `[samples, seq_len, d_model]`, the layer's input, and afterwards what the compressed
    layer is to be run on (`measure`). The experts of `loaded` are used up: what is kept of them,
    dequantized where it was packed, lies in their storage afterwards. selection: how many of each
    expert a survey of the model keeps; which is for these tokens to say, where they are asked.
    None: what the layer's own energies say.
    """
    assert loaded.experts is not None
    inputs: RoutedInputs | None
    if selection is None or recipe.packed:
        recorder = InputRecorder() if recipe.packed or recipe.refit else None
        alpha = recipe.alpha if selection is None else 0.0
        energies = measure(stream, layer, loaded, hidden, alpha, recorder)
        tokens = energies.tokens
        if selection is None:
            assert recipe.plan
            selection = select(energies, recipe.plan, recipe.align)
        else:
            selection = chosen_anew(energies, _norms(loaded), selection)
        inputs = recorder.routed(stream.structure.num_experts) if recorder else None
    else:
        inputs = record(stream, layer, loaded, hidden)
        tokens = torch.tensor([len(own) for own in inputs.tokens])
    of_shared = None
    if inputs and loaded.shared is not None:
        of_shared = inputs_of_shared(inputs, loaded.shared_gate)
    judge = whole = None
    if inputs and (recipe.surveys or recipe.refit):
        scale = scale_of_routed(loaded, stream.structure.moe_prefix(layer))
        last = judging_tokens(inputs, of_shared)
        judge = Whole.of(loaded, *last, scale, stream.device)
        if recipe.sweeps:
            whole = Whole.of(loaded, inputs, of_shared, scale, stream.device)
    fit, fit_shared = (_fitting(own, recipe, stream) for own in (inputs, of_shared))
    routed = _kept_routed(stream, layer, loaded.experts, selection, fit)
    shared = _kept_shared(stream, layer, loaded.shared, selection, fit_shared)
    if whole:
        _sweep(whole, routed, shared, recipe.sweeps, stream.checkpoint.dtype)
    tensors: dict[str, torch.Tensor] = {}
    rounded: tuple[int, ...] = ()
    uncompensated: tuple[int, ...] = ()
    unpolished: tuple[int, ...] = ()
    for kept in (routed, shared) if shared else (routed,):
        tensors |= _plain_tensors(stream.checkpoint, kept, selection.bits)
    if inputs and any(b < 16 for b in selection.bits):
        quantized = _quantize(routed, selection.bits, inputs, recipe, stream.device)
        tensors |= quantized.tensors
        _, rounded, uncompensated, unpolished = quantized
        if shared and of_shared:
            quantized = _quantize(shared, selection.bits, of_shared, recipe, stream.device)
            tensors |= quantized.tensors
            uncompensated += (len(tokens),) * len(quantized.uncompensated)
            unpolished += (len(tokens),) * len(quantized.unpolished)
    loaded.use_experts(routed.rows)
    if shared:
        set_shared(loaded.shared, shared.rows)
    unfitted = routed.fitted.refused
    if shared and shared.fitted.refused:
        unfitted = (*unfitted, len(tokens))
    going_on = replace(loaded, experts=routed.rows)
    error = judge.error(routed.rows, shared.rows if shared else None) if judge else None
    return CompressedLayer(
        tensors, going_on, tokens, selection, rounded, unfitted, uncompensated, unpolished, error
    )


def _sweep(
    whole: Whole, routed: _Kept, shared: _Kept | None, rounds: int, stored: torch.dtype
) -> None:
    """Fit what is kept, in place, to what the whole layer gave."""
    changed = fit_to_whole(whole, routed.rows, shared.rows if shared else None, rounds, stored)
    for kept, own in zip([part for part in (routed, shared) if part], changed, strict=True):
        for expert in own:
            kept.fitted.down[expert] = kept.rows.down[kept.rows.rows(expert)].clone()


def _norms(loaded: StreamedLayer) -> list[torch.Tensor]:
    """‖w‖² of every down vector, expert by expert, the shared one last."""
    assert loaded.experts is not None
    offsets = loaded.experts.offsets
    norms = list(norms_of(loaded.experts.down).split([b - a for a, b in pairwise(offsets)]))
    if loaded.shared is not None:
        norms.append(norms_of(loaded.shared.down_proj.weight.T))
    return norms


def _kept_routed(
    stream: ModelStream,
    layer: int,
    experts: RaggedTier[torch.Tensor],
    selection: Selection,
    fit: Fit,
) -> _Kept:
    """The kept rows, moved to the front of `experts`: a copy would hold a large layer twice.

    No expert moves back, so none is overwritten before it is read.
    """
    fitted = fit(experts, selection.experts)
    offsets = (0, *accumulate(len(rows) for rows in fitted.kept))
    matrices = (experts.gate, experts.up, experts.down)
    for expert, indices in enumerate(fitted.kept):
        old, new = experts.rows(expert), slice(offsets[expert], offsets[expert + 1])
        gate, up, down = (matrix[old] for matrix in matrices)
        own = select_rows(RaggedTier(gate, up, down, (0, len(gate))), [indices], stream.device)
        new_down = fitted.down[expert]
        moved = (own.gate, own.up, own.down if new_down is None else new_down)
        for matrix, own_rows in zip(matrices, moved, strict=True):
            matrix[new] = own_rows
    gate, up, down = (matrix[: offsets[-1]] for matrix in matrices)
    prefix = partial(stream.structure.expert_prefix, layer)
    kept = RaggedTier(gate, up, down, offsets)
    return _Kept(kept, selection.layout.experts, prefix, fitted)


def _fitting(inputs: RoutedInputs | None, recipe: Recipe, stream: ModelStream) -> Fit:
    """How experts that were given `inputs` are fitted, if they are."""
    if inputs is None or not recipe.refit:
        return lambda experts, kept: Refitted(kept, [None] * len(kept), ())
    # A survey says how many stay of each expert, and these tokens, which are more, say which.
    return partial(
        refit_experts,
        inputs=inputs,
        device=stream.device,
        stored=stream.checkpoint.dtype,
        choosing=recipe.eliminates,
    )


def _kept_shared(
    stream: ModelStream,
    layer: int,
    shared: Any,
    selection: Selection,
    fit: Fit,
) -> _Kept | None:
    if shared is None:
        return None
    whole = rows_of_shared(shared)
    fitted = fit(whole, selection.shared)
    rows = select_rows(whole, fitted.kept, stream.device)
    if fitted.down[0] is not None:
        rows = replace(rows, down=fitted.down[0].to(rows.down))
    return _Kept(
        rows,
        selection.layout.shared,
        lambda _, projection: stream.structure.shared_prefix(layer, projection),
        fitted,
    )


def set_shared(shared: Any, rows: RaggedTier[torch.Tensor]) -> None:
    """Give a shared expert's three linear layers the weights of `rows`, of any width."""
    for name, matrix in (("gate", rows.gate), ("up", rows.up), ("down", rows.down)):
        linear = getattr(shared, f"{name}_proj")
        weight = matrix.T if name == "down" else matrix
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)


def _plain_tensors(
    checkpoint: Checkpoint, kept: _Kept, bits: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The 16-bit tier in the dtype it was stored in, which need not be that of the run."""
    if bits[0] != 16:
        return {}
    tensors = {}
    for expert, (indices, counts) in enumerate(zip(kept.fitted.kept, kept.counts, strict=True)):
        for projection in PROJECTIONS if counts[0] else ():
            name = f"{kept.prefix(expert, projection)}.weight"
            dim, down = int(projection == "down"), kept.fitted.down[expert]
            stored = checkpoint.get(name)
            tensors[name] = stored.index_select(dim, indices[: counts[0]])
            if dim and down is not None:
                tensors[name] = down[: counts[0]].T.to("cpu", stored.dtype).contiguous()
        checkpoint.release()
    return tensors


def _quantize(
    kept: _Kept,
    bits: tuple[int, ...],
    inputs: RoutedInputs,
    recipe: Recipe,
    device: torch.device,
) -> _Quantized:
    """Quantize the packed tiers; their rows become the weights that will be served."""
    packed, stored = tuple(b for b in bits if b < 16), torch.tensor(bits)
    row_bits = torch.cat([stored.repeat_interleave(torch.tensor(tiers)) for tiers in kept.counts])
    tensors: dict[str, torch.Tensor] = {}
    rounded, uncompensated, unpolished = [], [], []
    for solved in quantize_experts(
        kept.rows,
        row_bits,
        inputs,
        group_size=recipe.group_size,
        solver=recipe.solver,
        weighted=recipe.weighted,
        refit=recipe.refit,
        polish=recipe.polishes,
        device=device,
    ):
        end = kept.rows.offsets[solved.expert + 1]
        counts = kept.counts[solved.expert][-len(packed) :]
        for projection, rows in solved.rows.items():
            matrix: torch.Tensor = getattr(kept.rows, projection)
            matrix[end - sum(counts) : end] = rows.dequantize()
            tensors |= packed_tensors(kept.prefix(solved.expert, projection), rows, counts, packed)
        if solved.rounded:
            rounded.append(solved.expert)
        if solved.uncompensated:
            uncompensated.append(solved.expert)
        if solved.unpolished:
            unpolished.append(solved.expert)
    return _Quantized(tensors, tuple(rounded), tuple(uncompensated), tuple(unpolished))
