"""Random tokens routed over a MoE layer's experts, and the work they make."""

from collections.abc import Iterator
from typing import Literal

import torch

from bench.shapes.published import Shape, layer_energies
from bench.speed.contestants import Contestant

Routing = Literal["even", "skewed"]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs_of(shape: Shape, tokens: int, routing: Routing, seed: int) -> Iterator[Inputs]:
    """Endless inputs: x, top-k weights and ids; the same x, since only routing costs anything.

    even: uniform, and over `num_experts // top_k` inputs every token slot meets each expert once,
    so that few repetitions already see the layer's mean width. skewed: each expert as often as the
    tokens that go with the energies of layer `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.d_model, generator=generator).bfloat16()
    choose = _even if routing == "even" else _skewed
    while True:
        for ids in choose(shape, tokens, seed, generator):
            weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(-1)
            yield x, weights, ids.int().contiguous()


def _even(
    shape: Shape, tokens: int, seed: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    order = torch.rand(tokens, shape.num_experts, generator=generator).argsort(1)
    for start in range(0, shape.num_experts - shape.top_k + 1, shape.top_k):
        yield order[:, start : start + shape.top_k]


def _skewed(
    shape: Shape, tokens: int, seed: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    load = layer_energies(shape, seed).tokens.double().clamp(min=1).expand(tokens, -1)
    yield torch.multinomial(load, shape.top_k, generator=generator)


def work(
    rival: Contestant, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[int, int]:
    """Bytes of the experts in `ids`, each counted once, and flop: two per weight and token."""
    tokens = torch.bincount(ids.flatten(), minlength=len(rival.expert_d_ff))
    read = rival.expert_bytes[tokens > 0].sum()
    return int(read), 2 * 3 * x.shape[1] * int((tokens * rival.expert_d_ff).sum())
