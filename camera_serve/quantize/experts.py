"""Quantizing the micro-experts of one MoE layer: GPTQ per expert on the tokens routed to it.

gate and up are solved first, on the layer's inputs; down on the activations that the quantized gate
and up make of them. Every group of weights lies inside one micro-expert, for down too, so that any
tier, split or order leaves it intact. Experts are solved many at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from camera_serve.kernels import RaggedTier
from camera_serve.quantize.gptq import solve_along_columns, solve_along_rows

MIN_TOKENS = 32
"""Experts that saw fewer tokens are rounded to nearest: their Hessian would say too little."""

SOLVER_BYTES = 2**31
"""Memory the Hessians of the experts solved at a time may take, with their factors."""

TOKENS_AT_ONCE = 16384
"""Tokens whose activations are held in float32 while a Hessian is summed."""

Solver = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class RoutedInputs:
    """What the routed tokens of a MoE layer were.

    x: `[num_tokens, d_model]`; tokens[e]: int64 indices of the tokens routed to expert e.
    """

    x: torch.Tensor
    tokens: tuple[torch.Tensor, ...]

    def of(self, expert: int, device: torch.device) -> torch.Tensor:
        """The inputs of one expert, float32 `[num_tokens_e, d_model]`."""
        return self.x[self.tokens[expert]].to(device, torch.float32)

    def batches(self, expert: int, device: torch.device) -> Iterator[torch.Tensor]:
        """The same, at most `TOKENS_AT_ONCE` tokens at a time: a shared expert sees all of them."""
        for tokens in self.tokens[expert].split(TOKENS_AT_ONCE):
            yield self.x[tokens].to(device, torch.float32)


class InputRecorder:
    """A forward pre-hook of an experts module that keeps its inputs and routes, on the CPU."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []

    def __call__(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keep `hidden_states` and `top_k_index` of one batch."""
        self._x.append(arguments[0].cpu())
        self._ids.append(arguments[1].cpu())

    def routed(self, num_experts: int) -> RoutedInputs:
        """All batches together, by expert."""
        ids = torch.cat(self._ids)
        order = torch.sort(ids.flatten(), stable=True).indices // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
        return RoutedInputs(torch.cat(self._x), order.split(counts))


def every_token(inputs: RoutedInputs) -> RoutedInputs:
    """The inputs of a shared expert: all tokens, in order."""
    return RoutedInputs(inputs.x, (torch.arange(len(inputs.x)),))


@dataclass(frozen=True)
class QuantizedRows:
    """The quantized micro-experts of one projection, expert by expert.

    codes: uint8 `[num_rows, d_model]`; scales, zeros: float16 `[num_rows, num_groups]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @classmethod
    def empty(cls, d_model: int, group_size: int) -> "QuantizedRows":
        """No rows."""
        grid = torch.empty(0, d_model // group_size, dtype=torch.float16)
        return cls(torch.empty(0, d_model, dtype=torch.uint8), grid, grid)

    def dequantize(self) -> torch.Tensor:
        """float32 `[num_rows, d_model]`."""
        groups = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        scaled = groups * self.scales.float()[..., None] + self.zeros.float()[..., None]
        return scaled.flatten(1)


@dataclass(frozen=True)
class QuantizedExperts:
    """The quantized tiers of some experts; expert e owns the rows `offsets[e]:offsets[e + 1]`.

    rounded: experts that saw fewer than `MIN_TOKENS` tokens.
    """

    gate: QuantizedRows
    up: QuantizedRows
    down: QuantizedRows
    offsets: tuple[int, ...]
    rounded: tuple[int, ...]


def quantize_experts(
    experts: RaggedTier[torch.Tensor],
    row_bits: torch.Tensor,
    inputs: RoutedInputs,
    *,
    group_size: int,
    solver: Solver,
    device: torch.device,
) -> QuantizedExperts:
    """Quantize the rows of `experts` whose `row_bits` are below 16 (Algorithm 3, lines 9-13).

    experts: 16-bit rows, falling tiers in each expert; row_bits: int64 `[num_rows]`. Rows of 16
    bits come first in an expert and stay as they are, so they take no part in its error.
    """
    packed = row_bits < 16
    widths = [int(packed[experts.rows(e)].sum()) for e in range(len(experts.offsets) - 1)]
    offsets = torch.tensor([0, *widths]).cumsum(0)
    seen = [len(tokens) for tokens in inputs.tokens]
    parts: list[tuple[QuantizedRows, QuantizedRows, QuantizedRows]] = []
    for chunk in _chunks(widths, inputs.x.shape[1]):
        batch = _Batch.load(experts, row_bits, chunk, widths, device)
        usable = [e if solver == "gptq" and seen[e] >= MIN_TOKENS else None for e in chunk]
        parts.append(_solve(batch, inputs, usable, group_size))
    nothing = QuantizedRows.empty(inputs.x.shape[1], group_size)
    gate, up, down = (
        _concatenate((nothing, *p)) for p in (zip(*parts, strict=True) if parts else ((), (), ()))
    )
    rounded = tuple(e for e, width in enumerate(widths) if width and seen[e] < MIN_TOKENS)
    return QuantizedExperts(gate, up, down, tuple(offsets.tolist()), rounded)


@dataclass(frozen=True)
class _Batch:
    """Some experts' rows to quantize, padded to one width with zeros.

    gate, up, down: float32 `[num_experts, max_width, d_model]`; levels: float32
    `[num_experts, max_width]`, the highest code; widths: rows that are no padding.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    levels: torch.Tensor
    widths: tuple[int, ...]

    @classmethod
    def load(
        cls,
        experts: RaggedTier[torch.Tensor],
        row_bits: torch.Tensor,
        chunk: list[int],
        widths: list[int],
        device: torch.device,
    ) -> "_Batch":
        own = [slice(experts.offsets[e + 1] - widths[e], experts.offsets[e + 1]) for e in chunk]

        def pad(matrix: torch.Tensor) -> torch.Tensor:
            rows = [matrix[span].to(device, torch.float32) for span in own]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        bits = [row_bits[span].to(device) for span in own]
        padded = torch.nn.utils.rnn.pad_sequence(bits, batch_first=True, padding_value=1)
        gate, up, down = pad(experts.gate), pad(experts.up), pad(experts.down)
        levels = 2.0**padded - 1
        return cls(gate, up, down, levels, tuple(widths[e] for e in chunk))


def _chunks(widths: list[int], d_model: int) -> Iterator[list[int]]:
    """Experts with rows to quantize, as many at a time as `SOLVER_BYTES` hold."""
    experts = [e for e, width in enumerate(widths) if width]
    widest = max(widths, default=0)
    per_expert = 4 * 4 * (d_model**2 + widest**2)
    size = max(1, SOLVER_BYTES // per_expert)
    for start in range(0, len(experts), size):
        yield experts[start : start + size]


def _solve(
    batch: _Batch, inputs: RoutedInputs, usable: list[int | None], group_size: int
) -> tuple[QuantizedRows, QuantizedRows, QuantizedRows]:
    """usable: for each expert of the batch its number, or None to round to nearest."""
    num_experts, width, d_model = batch.gate.shape
    hessians = torch.eye(d_model, device=batch.gate.device).repeat(num_experts, 1, 1)
    for slot, expert in enumerate(usable):
        if expert is not None:
            hessians[slot] = sum(x.T @ x for x in inputs.batches(expert, batch.gate.device))
    both, levels = torch.cat([batch.gate, batch.up], dim=1), batch.levels.repeat(1, 2)
    gate_up = solve_along_columns(both, hessians, levels, group_size)
    hessians = torch.eye(width, device=batch.gate.device).repeat(num_experts, 1, 1)
    for slot, expert in enumerate(usable):
        if expert is not None:
            hessians[slot] = _activation_hessian(gate_up.dequantized[slot], inputs, expert)
    down = solve_along_rows(
        batch.down.transpose(1, 2), hessians, batch.levels, group_size, batch.widths
    )
    return (
        _rows(gate_up.codes[:, :width], gate_up.scale[:, :width], gate_up.zero[:, :width], batch),
        _rows(gate_up.codes[:, width:], gate_up.scale[:, width:], gate_up.zero[:, width:], batch),
        _rows(down.codes.transpose(1, 2), down.scale, down.zero, batch),
    )


def _activation_hessian(gate_up: torch.Tensor, inputs: RoutedInputs, expert: int) -> torch.Tensor:
    """Σ h·hᵀ of what quantized gate and up make of one expert's tokens: `[width, width]`."""
    gate, up = gate_up.chunk(2)
    total = gate.new_zeros(len(gate), len(gate))
    for x in inputs.batches(expert, gate.device):
        activations = functional.silu(x @ gate.T) * (x @ up.T)
        total += activations.T @ activations
    return total


def _rows(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, batch: _Batch
) -> QuantizedRows:
    """Drop the padding: `[num_experts, max_width, …]` to `[num_rows, …]`, on the CPU."""

    def flat(padded: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[:n] for rows, n in zip(padded, batch.widths, strict=True)]).cpu()

    return QuantizedRows(flat(codes), flat(scale).half(), flat(zero).half())


def _concatenate(parts: tuple[QuantizedRows, ...]) -> QuantizedRows:
    return QuantizedRows(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
    )
