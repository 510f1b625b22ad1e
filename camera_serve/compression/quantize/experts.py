"""Quantizing the micro-experts of one MoE layer: GPTQ per expert on the tokens routed to it.

gate and up are solved first, on the layer's inputs; down on the activations that the quantized gate
and up make of them. Every group of weights lies inside one micro-expert, for down too, so that any
tier, split or order leaves it intact. Experts are solved many at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Literal, NamedTuple

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.compensation import activations_of, compensated
from camera_serve.compression.quantize.cost import SolveSize
from camera_serve.compression.quantize.gptq import (
    Solution,
    solve_along_columns,
    solve_along_rows,
)
from camera_serve.compression.quantize.held_back import HeldBack
from camera_serve.compression.quantize.polish import SWEEPS, polish_along_columns, polish_along_rows
from camera_serve.models.structure import Projection
from camera_serve.ragged.layer import QuantizedRows, RaggedTier

MIN_TOKENS = 32
"""Experts that saw fewer tokens are rounded to nearest: their Hessian would say too little."""

TOKENS_PER_COLUMN = 8
"""With so many tokens per column of a Hessian, half of what routing weights say of them is used."""

Solver = Literal["gptq", "rtn"]

Judges = Sequence[HeldBack | None]


@dataclass(frozen=True)
class QuantizedExpert:
    """The packed tiers of one expert.

    rounded: to nearest, because it saw fewer than `MIN_TOKENS` tokens, or because what it saw gives
    no Hessian that could be factored. unpolished: what polishing made of it, or of its gate and up
    or its down alone, was worse for tokens held back, and was not taken. uncompensated: down does
    not make up for what gate and up have lost, as that would not suit those tokens.
    """

    expert: int
    rows: dict[Projection, QuantizedRows]
    rounded: bool
    unpolished: bool = False
    uncompensated: bool = False


def quantize_experts(
    experts: RaggedTier[torch.Tensor],
    row_bits: torch.Tensor,
    inputs: RoutedInputs,
    *,
    group_size: int,
    solver: Solver,
    weighted: bool = False,
    refit: bool = False,
    polish: bool = False,
    device: torch.device,
) -> Iterator[QuantizedExpert]:
    """Quantize the rows of `experts` whose `row_bits` are below 16 (Algorithm 3, lines 9-13).

    experts: 16-bit rows, falling tiers in each expert; row_bits: int64 `[num_rows]`. Rows of 16
    bits come first in an expert and stay as they are, so they take no part in its error.
    weighted: tokens count in the Hessians by the square of their routing weight, as they do in the
    output, where there are enough; refit: down makes up for what quantizing gate and up has lost,
    where held back tokens are better off; polish: codes, scales and zeros are decided again with
    all others in place, by Hessians of all tokens but those that are held back to judge it. Yields
    the experts with rows below 16 bits, in order; a caller may overwrite the rows of an expert once
    it has been given it, so that a layer need not be held twice.
    """
    packed = row_bits < 16
    widths = [int(packed[experts.rows(e)].sum()) for e in range(len(experts.offsets) - 1)]
    seen = [len(tokens) for tokens in inputs.tokens]
    size = SolveSize(len(widths), max(widths), inputs.x.shape[1], group_size, polish)
    given = _tempered(inputs) if weighted else _unweighted(inputs)
    for chunk in _chunks(widths, size):
        usable = tuple(e if solver == "gptq" and seen[e] >= MIN_TOKENS else None for e in chunk)
        rows = [slice(experts.offsets[e + 1] - widths[e], experts.offsets[e + 1]) for e in chunk]
        batch = _Batch.load(experts, row_bits, rows, usable, device)
        solved = _solve(batch, given, size, refit)
        # Or the next chunk would be loaded beside this one.
        del batch
        for expert, own in zip(chunk, solved, strict=True):
            rounded = own.failed or seen[expert] < MIN_TOKENS
            yield QuantizedExpert(expert, own.rows, rounded, own.unpolished, own.uncompensated)


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


def _tempered(inputs: RoutedInputs) -> RoutedInputs:
    """Routing weights whose squares are the nearer to their mean the fewer tokens an expert saw.

    Uneven weights let a Hessian rest on fewer tokens, which costs more than they are worth where it
    has few for its width: a² counts by n / (n + 8 · d_model).
    """
    enough = TOKENS_PER_COLUMN * inputs.x.shape[1]
    squares = [weights.double().square() for weights in inputs.weights]
    tempered = tuple(
        own.lerp(own.mean(), enough / (len(own) + enough)).sqrt().float() for own in squares
    )
    return replace(inputs, weights=tempered)


class _Solved(NamedTuple):
    """One expert's quantized rows; failed: a Hessian could not be factored; the rest as in
    `QuantizedExpert`."""

    rows: dict[Projection, QuantizedRows]
    failed: bool
    unpolished: bool
    uncompensated: bool


def _solve(batch: _Batch, inputs: RoutedInputs, size: SolveSize, refit: bool) -> list[_Solved]:
    """Every expert of a batch; inputs: of all tokens; `size.polish` says whether to polish."""
    judges: Judges = [None] * len(batch.experts)
    fitting = inputs
    if size.polish:
        fitting, judges = _judged(batch, inputs)
    gate_up, worse_gate_up = _solve_gate_up(batch, fitting, size, judges)
    refused: list[int] = []
    if refit:
        hessians, refused = _compensate(
            batch, gate_up.dequantized, inputs, size.tokens_at_once, judges
        )
    else:
        hessians = _hessians(
            batch,
            fitting,
            size,
            batch.down.shape[1],
            lambda slot, x: activations_of(gate_up.dequantized[slot], x),
        )
    down, worse_down = _solve_down(batch, gate_up.dequantized, hessians, size, judges)
    failed = (gate_up.failed | down.failed).tolist()
    worse = [a or b for a, b in zip(worse_gate_up, worse_down, strict=True)]
    uncompensated = [slot in refused for slot in range(len(failed))]
    packed = _packed(batch, gate_up, down)
    return list(starmap(_Solved, zip(packed, failed, worse, uncompensated, strict=True)))


def _solve_gate_up(
    batch: _Batch, inputs: RoutedInputs, size: SolveSize, judges: Judges
) -> tuple[Solution, list[bool]]:
    levels = batch.levels.repeat(1, 2)
    hessians = _hessians(batch, inputs, size, size.d_model, lambda _, x: x)
    solved = solve_along_columns(batch.gate_up, hessians, levels, size.group_size)
    if not size.polish:
        return solved, [False] * len(judges)

    def error(judge: HeldBack, slot: int, solution: Solution) -> float:
        lost = judge.activations(solution.dequantized[slot]) - judge.activations(
            batch.gate_up[slot]
        )
        return judge.error(lost, batch.down[slot])

    polished = polish_along_columns(
        batch.gate_up, hessians, levels, solved, size.group_size, SWEEPS
    )
    return _better(solved, polished, judges, error)


def _solve_down(
    batch: _Batch,
    gate_up: torch.Tensor,
    hessians: torch.Tensor,
    size: SolveSize,
    judges: Judges,
) -> tuple[Solution, list[bool]]:
    """Down, under the Hessians of the activations that the dequantized `gate_up` makes."""

    def error(judge: HeldBack, slot: int, solution: Solution) -> float:
        lost = solution.dequantized[slot].T - batch.down[slot]
        return judge.error(judge.activations(gate_up[slot]), lost)

    weights, levels = batch.down.transpose(1, 2), batch.levels
    solved = solve_along_rows(weights, hessians, levels, size.group_size, batch.widths)
    if not size.polish:
        return solved, [False] * len(judges)
    polished = polish_along_rows(weights, hessians, levels, solved, size.group_size, SWEEPS)
    return _better(solved, polished, judges, error)


def _judged(batch: _Batch, inputs: RoutedInputs) -> tuple[RoutedInputs, Judges]:
    """The inputs to fit to, and the tokens that judge the polish of each expert.

    None, and all of its tokens to fit to, for an expert that is rounded to nearest or saw too few.
    """
    fitting, held = inputs.split()
    tokens, weights = list(inputs.tokens), list(inputs.weights)
    judges: list[HeldBack | None] = [None] * len(batch.experts)
    for slot, expert in enumerate(batch.experts):
        if expert is None or len(fitting.tokens[expert]) < MIN_TOKENS:
            continue
        if len(held.tokens[expert]):
            tokens[expert], weights[expert] = fitting.tokens[expert], fitting.weights[expert]
            judges[slot] = HeldBack.of(held.of(expert), batch.down.device)
    return replace(inputs, tokens=tuple(tokens), weights=tuple(weights)), judges


def _better(
    solved: Solution,
    polished: Solution,
    judges: Judges,
    error: Callable[[HeldBack, int, Solution], float],
) -> tuple[Solution, list[bool]]:
    """Each expert polished where its judge finds no larger error, and where one does."""
    worse = [
        # NaN is worse.
        judge is not None and not error(judge, slot, polished) <= error(judge, slot, solved)
        for slot, judge in enumerate(judges)
    ]
    stay = torch.tensor([w or j is None for w, j in zip(worse, judges, strict=True)])
    stay = stay.to(solved.codes.device)[:, None, None]
    codes, dequantized, scale, zero = (
        getattr(solved, name).where(stay, getattr(polished, name))
        for name in ("codes", "dequantized", "scale", "zero")
    )
    return Solution(codes, dequantized, scale, zero, solved.failed), worse


def _packed(
    batch: _Batch, gate_up: Solution, down: Solution
) -> list[dict[Projection, QuantizedRows]]:
    """Each expert's rows to store."""
    width = batch.down.shape[1]
    gate_codes, up_codes = gate_up.codes.split(width, dim=1)
    gate_scale, up_scale = gate_up.scale.split(width, dim=1)
    gate_zero, up_zero = gate_up.zero.split(width, dim=1)
    by_projection: dict[Projection, list[QuantizedRows]] = {
        "gate": _rows(gate_codes, gate_scale, gate_zero, batch.widths),
        "up": _rows(up_codes, up_scale, up_zero, batch.widths),
        "down": _rows(down.codes.transpose(1, 2), down.scale, down.zero, batch.widths),
    }
    return [
        {projection: rows[slot] for projection, rows in by_projection.items()}
        for slot in range(len(batch.widths))
    ]


def _compensate(
    batch: _Batch, quantized: torch.Tensor, inputs: RoutedInputs, at_once: int, judges: Judges
) -> tuple[torch.Tensor, list[int]]:
    """Let each expert's down make up, in place, for what its gate and up have lost.

    Returns the Hessians of down, as `_hessians` gives them, but without what is held back where
    that has a polish to judge; and the slots of experts whose tokens fit nothing that is better.
    """
    refused = []
    hessians = _identities(batch, batch.down.shape[1])
    for slot, expert in enumerate(batch.experts):
        if expert is None:
            continue
        width, half = batch.widths[slot], batch.down.shape[1]
        own = [
            torch.cat([m[slot, :width], m[slot, half : half + width]])
            for m in (batch.gate_up, quantized)
        ]
        down = batch.down[slot, :width]
        found = compensated(own[0], own[1], down, inputs.of(expert), at_once)
        hessians[slot] = 0
        hessians[slot, :width, :width] = found.hessian
        if judges[slot] is None:
            hessians[slot, :width, :width] += found.held_back
        if found.down is None:
            refused.append(slot)
        else:
            batch.down[slot, :width] = found.down
    return hessians, refused


def _identities(batch: _Batch, columns: int) -> torch.Tensor:
    """The Hessians of experts to round to nearest, `[num_experts, columns, columns]`."""
    return torch.eye(columns, device=batch.down.device).repeat(len(batch.experts), 1, 1)


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
    hessians = _identities(batch, columns)
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
