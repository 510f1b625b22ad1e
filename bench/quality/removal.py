"""Removal without energies, the baselines of CAMERA-P: at random, and by weight norm alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from camera_serve.models import MoeStructure

Scores = tuple[torch.Tensor, ...]
"""One float tensor `[num_micro_experts]` per MoE layer: routed experts in order, then shared."""


def weight_norms(model: nn.Module, structure: MoeStructure) -> Scores:
    """`‖w_gate‖ · ‖w_up‖ · ‖w_down‖` of every micro-expert: what weights alone say about φ."""
    scores = []
    for layer in structure.moe_layers:
        experts = _experts(model, structure, layer)
        gate, up = experts.gate_up_proj.detach().norm(dim=-1).chunk(2, dim=-1)
        norms = [(gate * up * experts.down_proj.detach().norm(dim=-2)).flatten()]
        if shared := _shared(model, structure, layer):
            rows = (shared.gate_proj.weight.norm(dim=-1), shared.up_proj.weight.norm(dim=-1))
            norms.append((rows[0] * rows[1] * shared.down_proj.weight.norm(dim=-2)).detach())
        scores.append(torch.cat(norms))
    return tuple(scores)


def random_scores(structure: MoeStructure, seed: int) -> Scores:
    """Uniform scores: the lowest of them are a random subset of each layer."""
    generator = torch.Generator().manual_seed(seed)
    count = structure.micro_experts_per_layer
    return tuple(torch.rand(count, generator=generator) for _ in structure.moe_layers)


@contextmanager
def removed(
    model: nn.Module, structure: MoeStructure, scores: Scores, counts: Sequence[int]
) -> Iterator[None]:
    """Inside the block, the `counts[i]` lowest-scored micro-experts of MoE layer i give nothing.

    Their down columns are zero, so that their coefficient no longer matters; the model is as
    before afterwards.
    """
    originals = []
    with torch.no_grad():
        for layer, score, count in zip(structure.moe_layers, scores, counts, strict=True):
            kept = torch.ones_like(score)
            kept[score.argsort(stable=True)[:count]] = 0
            for weight, mask in _down_weights(model, structure, layer, kept):
                originals.append((weight, weight.detach().clone()))
                weight.mul_(mask)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def _down_weights(
    model: nn.Module, structure: MoeStructure, layer: int, kept: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    routed = structure.num_experts * structure.d_ff
    yield (
        _experts(model, structure, layer).down_proj,
        kept[:routed].view(structure.num_experts, 1, structure.d_ff),
    )
    if shared := _shared(model, structure, layer):
        yield shared.down_proj.weight, kept[routed:]


def _experts(model: nn.Module, structure: MoeStructure, layer: int) -> Any:
    return model.get_submodule(structure.to_hf_name(f"{structure.moe_prefix(layer)}.experts"))


def _shared(model: nn.Module, structure: MoeStructure, layer: int) -> Any:
    if not structure.shared_d_ff:
        return None
    return model.get_submodule(structure.to_hf_name(structure.shared_expert_prefix(layer)))
