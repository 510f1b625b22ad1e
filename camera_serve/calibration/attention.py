"""Running a layer's attention once, though its experts change between two runs of the layer.

A layer adds two things to what it is given: first what its attention makes of it, then what its
experts make of the sum. So a run whose experts add nothing leaves that sum, and a run on the sum
whose attention adds nothing gives the layer's output. Both run the family's own code.
"""

from typing import Any

import torch
from torch import nn

from camera_serve.calibration.streaming import ModelStream, RoutedExperts, StreamedLayer, replaced
from camera_serve.ragged.layer import RaggedLayer

TRIED_TOKENS = 16
"""Tokens a layer is tried on: its form lies in its code, which all of them pass."""


class AddsNothing(nn.Module):
    """Stands in for a layer's attention or experts and adds nothing to what the layer is given.

    `returns`: how many values the module it stands for returns, None where it returns no tuple.
    """

    def __init__(self, returns: int | None = None) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """`[..., d_model]` -> the same shape."""
        added = nothing(hidden_states)
        if self.returns is None:
            return added
        # Layers keep what they do not use until they return: it must take no memory.
        unused = added.new_full((), -0.0).expand_as(added)
        return (added, *[unused] * (self.returns - 1))


def nothing(like: torch.Tensor) -> torch.Tensor:
    """What changes no bit of what it is added to: -0.0, since -0.0 + 0.0 would be 0.0."""
    return torch.full_like(like, -0.0)


@torch.inference_mode()
def without_attention(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor
) -> dict[str, nn.Module]:
    """What to put into a MoE layer, by name, so that it goes on from its output without experts.

    hidden: `[samples, seq_len, d_model]`, the layer's input. The layer is tried on its first
    tokens: empty unless both ways agree to the bit, as in a family that scales the sum.
    """
    name = _attention_name(loaded)
    if name is None or loaded.experts is None:
        return {}
    returned: list[Any] = []
    hook = getattr(loaded.module, name).register_forward_hook(
        lambda *call: returned.append(call[-1])
    )
    tried, experts = hidden[:1, :TRIED_TOKENS], RoutedExperts(RaggedLayer((loaded.experts,)))
    with loaded.experts_replaced(experts, None):
        (wanted,) = stream.outputs(layer, loaded, tried)
    hook.remove()
    with loaded.experts_replaced(AddsNothing(), AddsNothing()):
        (attended,) = stream.outputs(layer, loaded, tried)
    silent = AddsNothing(len(returned[0]) if isinstance(returned[0], tuple) else None)
    with replaced(loaded.module, {name: silent}), loaded.experts_replaced(experts, None):
        (found,) = stream.outputs(layer, loaded, attended)
    return {name: silent} if found.equal(wanted) else {}


def _attention_name(loaded: StreamedLayer) -> str | None:
    """What mixes tokens in a decoder layer: all that has matrices, if it is one, beside the MoE."""
    names = [
        name
        for name, child in loaded.module.named_children()
        if name != loaded.moe_name and any(weight.ndim > 1 for weight in child.parameters())
    ]
    return names[0] if len(names) == 1 else None
