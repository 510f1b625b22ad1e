"""Tokens that no fit has seen judge what a fit has made of an expert."""

import math
from dataclasses import dataclass, replace

import torch

from camera_serve.calibration.inputs import RoutedInputs
from camera_serve.compression.quantize.compensation import activations_of

TOKENS = 256
"""Held back tokens that judge an expert, at most: they are read in float32, several times."""


@dataclass(frozen=True)
class HeldBack:
    """Held back tokens of one expert.

    x: float32 `[num_tokens, d_model]`; weights: `[num_tokens, 1]`, the routing weights.
    """

    x: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, held: RoutedInputs, device: torch.device) -> "HeldBack":
        """Up to `TOKENS` of those held back, spread over all of them; held: of one expert alone."""
        some = slice(None, None, math.ceil(len(held.tokens[0]) / TOKENS))
        held = replace(held, tokens=(held.tokens[0][some],), weights=(held.weights[0][some],))
        ((x, weights),) = held.batches(0, TOKENS, device)
        return cls(x, weights[:, None])

    def activations(self, gate_up: torch.Tensor) -> torch.Tensor:
        """What they become, weighted, `[num_tokens, d_ff]`; gate_up: `[2 * d_ff, d_model]`."""
        return activations_of(gate_up, self.x) * self.weights

    @staticmethod
    def error(activations: torch.Tensor, down: torch.Tensor) -> float:
        """The squared norm of what an expert gives: of a difference in either, the error it makes.

        activations: `[num_tokens, d_ff]`; down: `[d_ff, d_model]`.
        """
        return float((activations @ down).square().sum(dtype=torch.float64))
