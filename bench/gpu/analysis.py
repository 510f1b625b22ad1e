"""Energies of one Qwen2-57B-A14B-shaped layer: ours, and by running every expert on every token."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.gpu.random_layers import DTYPE, Tokens, ragged_layer, random_tokens
from bench.gpu.timing import median_seconds
from bench.shapes.published import SHAPES, Shape
from camera_serve.calibration.streaming import TOKENS_PER_BATCH
from camera_serve.ragged.layer import RaggedTier, dense_rows
from camera_serve.ranking.energy import RoutedExpertsMeter, SharedExpertMeter
from camera_serve.recipe import TierPlan

SHAPE = "qwen2-57b-a14b"
WINDOWS, WINDOW = 128, 2048
ALPHA = 0.95
AGREEMENT = 5e-2
"""Energies are sums of squares of values that the other formula rounds to bfloat16."""


class DisagreementError(RuntimeError):
    """The two ways to the energies do not lead to the same: there is nothing to time."""


def measure(*, windows: int = WINDOWS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Seconds of both on the same layer and tokens, and how far their energies are apart.

    Yields once. Raises `DisagreementError`.
    """
    shape, device = SHAPES[SHAPE], torch.device("cuda")
    tier = full_tier(shape, seed, device)
    shared = shared_expert(shape, device)
    batch = random_tokens(shape, TOKENS_PER_BATCH, seed, device, balanced=True)
    rounds = windows * WINDOW // TOKENS_PER_BATCH
    ours, theirs = (
        partial(camera_energies, tier, shared, batch, rounds),
        partial(every_expert_on_every_token, tier, batch, rounds),
    )
    wanted = theirs()
    difference = float((ours() - wanted).norm() / wanted.norm())
    if not difference <= AGREEMENT:
        raise DisagreementError(f"energies differ by {difference:.2g}, relative, > {AGREEMENT}")
    seconds, their_seconds = median_seconds(ours), median_seconds(theirs)
    yield {
        "shape": SHAPE,
        "tokens": rounds * TOKENS_PER_BATCH,
        "seconds": {
            "camera-serve, with shared experts": seconds,
            "every expert": their_seconds,
        },
        "ratio": their_seconds / seconds,
        "relative_difference": difference,
        "left": [],
    }


def full_tier(shape: Shape, seed: int, device: torch.device) -> RaggedTier[torch.Tensor]:
    """All micro-experts of the routed experts, in 16 bits."""
    (tier,) = ragged_layer(shape, TierPlan.parse("16:1"), seed, device).tiers
    gate, up, down = (dense_rows(m, slice(None), DTYPE) for m in (tier.gate, tier.up, tier.down))
    return RaggedTier(gate, up, down, tier.offsets)


def shared_expert(shape: Shape, device: torch.device) -> SharedExpertMeter:
    """The layer's shared expert, random, gated as Qwen2-MoE gates it."""
    shared = nn.Module()
    for name, sizes in (
        ("gate_proj", (shape.d_model, shape.shared_d_ff)),
        ("up_proj", (shape.d_model, shape.shared_d_ff)),
        ("down_proj", (shape.shared_d_ff, shape.d_model)),
    ):
        linear = nn.Linear(*sizes, bias=False, device=device, dtype=DTYPE)
        setattr(shared, name, linear)
    gate = torch.randn(1, shape.d_model, device=device, dtype=DTYPE) * shape.d_model**-0.5
    return SharedExpertMeter(shared, gate)


@torch.inference_mode()
def camera_energies(
    tier: RaggedTier[torch.Tensor], shared: SharedExpertMeter, batch: Tokens, rounds: int
) -> torch.Tensor:
    """Energies of all routed micro-experts as `compress` measures them, the shared ones beside.

    No down projection, as in the other way: `analyze`, which changes nothing, takes the same sums
    while the layer makes its output. rounds: how often the batch is looked at.
    """
    meter = RoutedExpertsMeter(tier, batch.x.device)
    for _ in range(rounds):
        meter(batch.x, batch.ids, batch.weights)
        shared(batch.x)
    shared.sums.energies(shared.shared.down_proj.weight.T, ALPHA)
    return meter.sums.energies(tier.down, ALPHA)


@torch.inference_mode()
def every_expert_on_every_token(
    tier: RaggedTier[torch.Tensor], batch: Tokens, rounds: int
) -> torch.Tensor:
    """Eq. 11 with every expert's activations on all tokens, weighted by 0 where not routed.

    One window of text at a time, as the official code runs a model.
    """
    num_experts = len(tier.offsets) - 1
    share = torch.zeros(len(batch.x), num_experts, device=batch.x.device)
    share.scatter_(1, batch.ids.long(), batch.weights)
    energies = []
    for expert in range(num_experts):
        rows = tier.rows(expert)
        square_sum: torch.Tensor | float = 0.0
        square_max = torch.zeros(rows.stop - rows.start, device=batch.x.device)
        for window in list(zip(batch.x.split(WINDOW), share.split(WINDOW), strict=True)) * rounds:
            x, weight = window
            gate, up = functional.linear(x, tier.gate[rows]), functional.linear(x, tier.up[rows])
            phi = functional.silu(gate) * up * weight[:, expert, None].to(DTYPE)
            squares = phi.float().square()
            square_sum = square_sum + squares.sum(0)
            square_max = torch.maximum(square_max, squares.amax(0))
        norms = tier.down[rows].float().norm(dim=1).square()
        energies.append(((1 - ALPHA) * square_sum + ALPHA * square_max) * norms)
    return torch.cat(energies).double()


def table(result: dict[str, Any]) -> str:
    """One line each."""
    times = [f"{name}: {seconds:.2f} s" for name, seconds in result["seconds"].items()]
    head = f"{result['shape']}, one layer, {result['tokens']} tokens"
    return "\n".join([head, *times, f"ratio {result['ratio']:.1f}"])
