"""Quantizing the micro-experts of one MoE layer: GPTQ per expert on the tokens routed to it.

gate and up are solved first, on the layer's inputs; down on the activations that the quantized gate
and up make of them. Every group of weights lies inside one micro-expert, for down too, so that any
tier, split or order leaves it intact. Experts are solved many at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.compensation import activations_of, compensated
from camera_serve.compression.quantize.cost import SolveSize
from camera_serve.compression.quantize.gptq import solve_along_columns, solve_along_rows
from camera_serve.models.structure import Projection
from camera_serve.ragged.layer import QuantizedRows, RaggedTier

MIN_TOKENS = 32
"""Experts that saw fewer tokens are rounded to nearest: their Hessian would say too little."""

Solver = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class QuantizedExpert:
    """The packed tiers of one expert.

    rounded: to nearest, because it saw fewer than `MIN_TOKENS` tokens, or because what it saw gives
    no Hessian that could be factored.
    """

    expert: int
    rows: dict[Projection, QuantizedRows]
    rounded: bool


def quantize_experts(
    experts: RaggedTier[torch.Tensor],
    row_bits: torch.Tensor,
    inputs: RoutedInputs,
    *,
    group_size: int,
    solver: Solver,
    weighted: bool = False,
    refit: bool = False,
    device: torch.device,
) -> Iterator[QuantizedExpert]:
    """Quantize the rows of `experts` whose `row_bits` are below 16 (Algorithm 3, lines 9-13).

    experts: 16-bit rows, falling tiers in each expert; row_bits: int64 `[num_rows]`. Rows of 16
    bits come first in an expert and stay as they are, so they take no part in its error.
    weighted: tokens count in the Hessians by the square of their routing weight, as they do in the
    output; refit: down makes up for what quantizing gate and up has lost, where held back tokens
    are better off. Yields the experts with rows below 16 bits, in order; a caller may overwrite the
    rows of an expert once it has been given it, so that a layer need not be held twice.
    """
    packed = row_bits < 16
    widths = [int(packed[experts.rows(e)].sum()) for e in range(len(experts.offsets) - 1)]
    seen = [len(tokens) for tokens in inputs.tokens]
    size = SolveSize(len(widths), max(widths), inputs.x.shape[1], group_size)
    for chunk in _chunks(widths, size):
        usable = tuple(e if solver == "gptq" and seen[e] >= MIN_TOKENS else None for e in chunk)
        rows = [slice(experts.offsets[e + 1] - widths[e], experts.offsets[e + 1]) for e in chunk]
        batch = _Batch.load(experts, row_bits, rows, usable, device)
        solved = _solve(batch, inputs if weighted else _unweighted(inputs), size, refit)
        # Or the next chunk would be loaded beside this one.
        del batch
        for expert, (quantized, failed) in zip(chunk, solved, strict=True):
            yield QuantizedExpert(expert, quantized, failed or seen[expert] < MIN_TOKENS)


@dataclass(frozen=True)
class _Batch:
    """Some experts' rows to quantize, padded to one width with zeros.

    gate_up: float32 `[num_experts, 2 * max_width, d_model]`; down: float32 `[num_experts,
    max_width, d_model]`; levels: float32 `[num_experts, max_width]`, the highest code; widths: rows
    that are no padding; experts: their numbers, None for one to round to nearest.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    levels: torch.Tensor
    widths: tuple[int, ...]
    experts: tuple[int | None, ...]

    @classmethod
    def load(
        cls,
        matrices: RaggedTier[torch.Tensor],
        row_bits: torch.Tensor,
        rows: list[slice],
        experts: tuple[int | None, ...],
        device: torch.device,
    ) -> "_Batch":
        widths = tuple(span.stop - span.start for span in rows)
        shape = (max(widths), matrices.gate.shape[1])
        gate_up = torch.zeros(len(rows), 2, *shape, device=device)
        down = torch.zeros(len(rows), *shape, device=device)
        levels = torch.ones(len(rows), max(widths), device=device)
        for slot, (span, width) in enumerate(zip(rows, widths, strict=True)):
            gate_up[slot, 0, :width] = matrices.gate[span]
            gate_up[slot, 1, :width] = matrices.up[span]
            down[slot, :width] = matrices.down[span]
            levels[slot, :width] = 2.0 ** row_bits[span].to(device) - 1
        return cls(gate_up.flatten(1, 2), down, levels, widths, experts)


def _chunks(widths: list[int], size: SolveSize) -> Iterator[list[int]]:
    """The experts with rows to quantize, as many at a time as are solved together."""
    experts = [e for e, width in enumerate(widths) if width]
    for start in range(0, len(experts), size.experts_at_once):
        yield experts[start : start + size.experts_at_once]


def _unweighted(inputs: RoutedInputs) -> RoutedInputs:
    return replace(inputs, weights=tuple(torch.ones(len(tokens)) for tokens in inputs.tokens))


def _solve(
    batch: _Batch, inputs: RoutedInputs, size: SolveSize, refit: bool
) -> list[tuple[dict[Projection, QuantizedRows], bool]]:
    """The quantized rows of each expert of a batch, and whether a Hessian of it failed."""
    levels, width = batch.levels.repeat(1, 2), batch.down.shape[1]
    hessians = _hessians(batch, inputs, size, size.d_model, lambda _, x: x)
    gate_up = solve_along_columns(batch.gate_up, hessians, levels, size.group_size)

    def activations(slot: int, x: torch.Tensor) -> torch.Tensor:
        return activations_of(gate_up.dequantized[slot], x)

    if refit:
        _compensate(batch, gate_up.dequantized, inputs, size.tokens_at_once)
    hessians = _hessians(batch, inputs, size, width, activations)
    down = solve_along_rows(
        batch.down.transpose(1, 2), hessians, batch.levels, size.group_size, batch.widths
    )
    gate_codes, up_codes = gate_up.codes.split(width, dim=1)
    gate_scale, up_scale = gate_up.scale.split(width, dim=1)
    gate_zero, up_zero = gate_up.zero.split(width, dim=1)
    by_projection: dict[Projection, list[QuantizedRows]] = {
        "gate": _rows(gate_codes, gate_scale, gate_zero, batch.widths),
        "up": _rows(up_codes, up_scale, up_zero, batch.widths),
        "down": _rows(down.codes.transpose(1, 2), down.scale, down.zero, batch.widths),
    }
    failed = (gate_up.failed | down.failed).tolist()
    return [
        ({projection: rows[slot] for projection, rows in by_projection.items()}, failed[slot])
        for slot in range(len(batch.widths))
    ]


def _compensate(batch: _Batch, quantized: torch.Tensor, inputs: RoutedInputs, at_once: int) -> None:
    """Let each expert's down make up, in place, for what its gate and up have lost."""
    for slot, expert in enumerate(batch.experts):
        if expert is None:
            continue
        width, half = batch.widths[slot], batch.down.shape[1]
        own = [
            torch.cat([m[slot, :width], m[slot, half : half + width]])
            for m in (batch.gate_up, quantized)
        ]
        down = batch.down[slot, :width]
        fitted = compensated(own[0], own[1], down, inputs.of(expert), at_once)
        if fitted is not None:
            batch.down[slot, :width] = fitted


def _hessians(
    batch: _Batch,
    inputs: RoutedInputs,
    size: SolveSize,
    columns: int,
    features: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Σ f·fᵀ over the tokens of each expert, `[num_experts, columns, columns]`.

    `features(slot, x)`: what the weights to solve multiply, `[num_tokens, columns]`. Experts to
    round to nearest have the identity.
    """
    device = batch.down.device
    hessians = torch.eye(columns, device=device).repeat(len(batch.experts), 1, 1)
    for slot, expert in enumerate(batch.experts):
        if expert is None:
            continue
        hessians[slot] = 0
        for x, weights in inputs.batches(expert, size.tokens_at_once, device):
            f = features(slot, x) * weights[:, None]
            hessians[slot] += f.T @ f
    return hessians


def _rows(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, widths: Sequence[int]
) -> list[QuantizedRows]:
    """Each expert's rows without the padding after them, on the CPU."""
    return [
        QuantizedRows(c[:n].cpu().contiguous(), s[:n].half().cpu(), z[:n].half().cpu())
        for c, s, z, n in zip(codes, scale, zero, widths, strict=True)
    ]
