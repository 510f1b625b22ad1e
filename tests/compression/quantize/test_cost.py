"""What a solve is said to hold and take, before it is run."""

import time
from dataclasses import replace

import pytest
import torch

from camera_serve.compression.quantize import cost
from camera_serve.compression.quantize.cost import SolveSize, solve_seconds
from camera_serve.compression.quantize.experts import RoutedInputs, quantize_experts
from camera_serve.ragged.layer import RaggedTier

CPU = torch.device("cpu")
TOKENS = 128 * 2048

# Routed experts of DeepSeek-V3, Qwen2-57B-A14B and Qwen3-30B-A3B.
PUBLISHED = [
    SolveSize(256, 2048, 7168, 128),
    SolveSize(64, 2560, 3584, 128),
    SolveSize(128, 768, 2048, 128),
]


@pytest.mark.parametrize("size", PUBLISHED)
def test_experts_are_solved_in_chunks_that_fit(size: SolveSize) -> None:
    at_once = size.experts_at_once
    assert 1 < at_once < size.num_experts
    assert at_once * size.expert_bytes <= cost.SOLVER_BYTES < (at_once + 1) * size.expert_bytes
    assert size.peak_bytes(TOKENS) <= cost.SOLVER_BYTES + cost.ACTIVATION_BYTES
    # Their Hessians and factors alone, four matrices of d_model², are part of it.
    assert size.expert_bytes > 4 * 4 * size.d_model**2


def test_an_expert_too_large_for_the_bound_is_solved_alone_and_counted() -> None:
    # Qwen2-57B's shared expert: its Hessians are 20480².
    size = SolveSize(1, 20480, 3584, 128)
    assert size.experts_at_once == 1
    assert size.peak_bytes(TOKENS) > 4 * 4 * 20480**2 > cost.SOLVER_BYTES
    assert size.peak_bytes(TOKENS) - size.expert_bytes <= cost.ACTIVATION_BYTES


def test_few_experts_and_few_tokens_take_less() -> None:
    size = SolveSize(3, 64, 128, 32)
    assert size.experts_at_once == 3
    assert size.peak_bytes(10) - size.peak_bytes(0) == 10 * 4 * (3 * 128 + 4 * 64)


@pytest.mark.parametrize("size", PUBLISHED)
def test_polishing_takes_more_and_still_fits(size: SolveSize) -> None:
    polished = replace(size, polish=True)
    assert polished.expert_bytes >= size.expert_bytes
    # The damped Hessian beside the other, 16-bit weights, both solutions and what is lost.
    assert polished.expert_bytes > 4 * (2 * size.d_model**2 + 10 * size.width * size.d_model)
    assert polished.peak_bytes(TOKENS) <= cost.SOLVER_BYTES + cost.ACTIVATION_BYTES


@pytest.mark.parametrize("polish", [False, True])
def test_the_time_of_a_solve_is_foreseen(polish: bool) -> None:
    num_experts, width, d_model, tokens = 8, 128, 512, 512
    matrices = (torch.randn(num_experts * width, d_model) for _ in range(3))
    offsets = tuple(range(0, num_experts * width + 1, width))
    every, alike = torch.arange(tokens), torch.ones(tokens)
    inputs = RoutedInputs(
        torch.randn(tokens, d_model), (every,) * num_experts, (alike,) * num_experts
    )
    row_bits = torch.full((num_experts * width,), 2)
    start = time.perf_counter()
    solved = quantize_experts(
        RaggedTier(*matrices, offsets),
        row_bits,
        inputs,
        group_size=128,
        solver="gptq",
        polish=polish,
        device=CPU,
    )
    assert len(list(solved)) == num_experts
    seconds = time.perf_counter() - start
    square = torch.ones(512, 512)
    start = time.perf_counter()
    for _ in range(10):
        square @ square
    rate = 10 * 2 * 512**3 / (time.perf_counter() - start)
    expected = solve_seconds(SolveSize(num_experts, width, d_model, 128, polish), tokens, rate, CPU)
    # Within 20% on an idle machine; pieces of milliseconds are timed, and others may be at work.
    assert seconds / 4 < expected < 4 * seconds
