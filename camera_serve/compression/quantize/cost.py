"""What solving some experts' codes holds and takes: the size of a chunk, and `--dry-run`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from camera_serve.compression.quantize.gptq import (
    BLOCK,
    Solution,
    feedback_of,
    solve_along_columns,
    solve_along_rows,
)
from camera_serve.compression.quantize.polish import SWEEPS, polish_along_columns, polish_along_rows

SOLVER_BYTES = 2**31
"""Memory the experts solved at a time may take: their Hessians, factors and weights."""

ACTIVATION_BYTES = 2**29
TOKENS_AT_ONCE = 16384
"""Bounds of the tokens whose activations are held in float32 while a Hessian is summed."""

TIMED_WEIGHTS = 2**20
TIMED_COLUMNS = 512
"""Bounds of what is solved to time it: an estimate takes about a second on one core."""


@dataclass(frozen=True)
class SolveSize:
    """How large a solve is: up to `width` rows of `d_model` weights in each expert."""

    num_experts: int
    width: int
    d_model: int
    group_size: int
    polish: bool = False

    @property
    def expert_bytes(self) -> int:
        """Float32 memory of one expert's solve, at the largest of its four stages.

        Factoring holds the Hessian, its damped copy, the factor, and at most as much again inside
        the library that factors; the column loop holds the Hessian and its factor. Beside them are
        the expert's own weights and, from the loop on, what is quantized, its codes and the update
        of later columns. Polishing holds the damped Hessian in the factor's place, both solutions,
        and what each weight has lost. Fitting the grids of a block takes the last term.
        """
        weights = self.width * self.d_model
        loops = (10, 10) if self.polish else (8, 8)
        gate_up = max(4 * self.d_model**2 + 3 * weights, 2 * self.d_model**2 + loops[0] * weights)
        down = max(4 * self.width**2 + 6 * weights, 2 * self.width**2 + loops[1] * weights)
        return 4 * (max(gate_up, down) + 16 * self.width * max(BLOCK, self.group_size))

    @property
    def experts_at_once(self) -> int:
        """How many experts are solved together: as many as `SOLVER_BYTES` hold."""
        return max(1, min(self.num_experts, SOLVER_BYTES // self.expert_bytes))

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of an expert are added to its Hessian together."""
        return max(1, min(TOKENS_AT_ONCE, ACTIVATION_BYTES // self._token_bytes))

    @property
    def _token_bytes(self) -> int:
        """Three inputs (gathered, converted, and the one before) and four activations, float32."""
        return 4 * (3 * self.d_model + 4 * self.width)

    def peak_bytes(self, num_tokens: int) -> int:
        """Most memory the solve takes; num_tokens: the most that any expert is routed."""
        tokens = min(num_tokens, self.tokens_at_once)
        return self.experts_at_once * self.expert_bytes + tokens * self._token_bytes


def solve_seconds(
    size: SolveSize, num_tokens: float, flops_per_second: float, device: torch.device
) -> float:
    """Time of a solve whose experts are routed `num_tokens` each, scaled from timed pieces of it.

    Timed are one block of either column loop, polished where it is to be, and the factors. What is
    matrix products goes at the rate given: the Hessians, the activations, and the updates that
    blocks leave for later columns.
    """
    d_model, width = size.d_model, size.width
    loops = _gate_up_seconds(size, device) + _down_seconds(size, device)
    factors = _factor_seconds(d_model, device) + _factor_seconds(width, device)
    products = num_tokens * (2 * d_model**2 + 4 * d_model * width + 2 * width**2)
    updates = 2 * width * d_model**2 + d_model * width**2
    if size.polish:
        # Of all columns, where those of the loops are of the later ones alone.
        updates *= 1 + 2 * SWEEPS
    each = factors + (products + updates) / flops_per_second
    return math.ceil(size.num_experts / size.experts_at_once) * loops + size.num_experts * each


def _gate_up_seconds(size: SolveSize, device: torch.device) -> float:
    """Time of the column loop over gate and up of the experts solved together."""
    columns = min(size.d_model, max(BLOCK, size.group_size))
    timed = _timed_experts(size, 2 * size.width * columns)
    weights = _weights((timed, 2 * size.width, columns), device)
    levels = weights.new_ones(weights.shape[:2])
    hessians = torch.eye(columns, device=device).repeat(timed, 1, 1)

    def run() -> Solution:
        solved = solve_along_columns(weights, hessians, levels, size.group_size)
        if not size.polish:
            return solved
        return polish_along_columns(weights, hessians, levels, solved, size.group_size, SWEEPS)

    seconds = _seconds(run)
    return seconds * size.experts_at_once / timed * size.d_model / columns


def _down_seconds(size: SolveSize, device: torch.device) -> float:
    """Time of the column loop over down of the experts solved together."""
    columns = min(size.width, BLOCK)
    timed = _timed_experts(size, size.d_model * columns)
    weights = _weights((timed, size.d_model, columns), device)
    levels = weights.new_ones(timed, columns)
    hessians = torch.eye(columns, device=device).repeat(timed, 1, 1)

    def run() -> Solution:
        solved = solve_along_rows(weights, hessians, levels, size.group_size)
        if not size.polish:
            return solved
        return polish_along_rows(weights, hessians, levels, solved, size.group_size, SWEEPS)

    seconds = _seconds(run)
    return seconds * size.experts_at_once / timed * size.width / columns


def _timed_experts(size: SolveSize, weights_of_each: int) -> int:
    return max(1, min(size.experts_at_once, TIMED_WEIGHTS // weights_of_each))


def _weights(shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)


def _factor_seconds(columns: int, device: torch.device) -> float:
    timed = min(columns, TIMED_COLUMNS)
    hessians = torch.eye(timed, device=device)[None]
    return _seconds(lambda: feedback_of(hessians).factor) * (columns / timed) ** 3


def _seconds(run: Callable[[], Solution | torch.Tensor]) -> float:
    """Time of the second run: the first may load libraries."""
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        # Reading a number waits for the device.
        (result.codes if isinstance(result, Solution) else result)[0, 0, 0].item()
        seconds = time.perf_counter() - start
    return seconds
