"""Coefficients and decoding-time energies of micro-experts (Eq. 4 and 11, Algorithm 1)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from camera_serve.calibration.attention import nothing
from camera_serve.ragged.layer import RaggedTier

ROWS_AT_ONCE = 4096


def coefficients(
    gate: torch.Tensor, up: torch.Tensor, routing_weight: torch.Tensor
) -> torch.Tensor:
    """φ of Eq. 4, in float32: what each micro-expert multiplies its `down` vector by.

    gate, up: `[num_tokens, d_ff]` projections; routing_weight: `[num_tokens]`, the weight the
    model itself applies (1 for an ungated shared expert). Returns `[num_tokens, d_ff]`.
    """
    return functional.silu(gate.float()) * up.float() * routing_weight.float()[:, None]


@dataclass(frozen=True)
class CoefficientSums:
    """Σφ² and max φ² of some experts' micro-experts over the tokens seen so far.

    square_sum, square_max: float64 `[num_micro_experts]`; tokens: int64 `[num_experts]`; grams:
    Σφφᵀ of each expert, float32 `[num_experts, d_ff, d_ff]`, where they are wanted. Float64
    because ranks at the cut differ by less than bf16 resolves.
    """

    square_sum: torch.Tensor
    square_max: torch.Tensor
    tokens: torch.Tensor
    grams: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, num_micro_experts: int, num_experts: int, device: torch.device
    ) -> "CoefficientSums":
        """Nothing seen yet (Algorithm 1, line 1)."""
        return cls(
            torch.zeros(num_micro_experts, dtype=torch.float64, device=device),
            torch.zeros(num_micro_experts, dtype=torch.float64, device=device),
            torch.zeros(num_experts, dtype=torch.int64, device=device),
        )

    @property
    def width(self) -> int:
        """d_ff of the experts, which all have the same."""
        return len(self.square_sum) // len(self.tokens)

    def with_grams(self) -> "CoefficientSums":
        """The same, and Gram matrices."""
        shape = (len(self.tokens), self.width, self.width)
        return replace(self, grams=torch.zeros(shape, device=self.square_sum.device))

    def add(self, expert: int, rows: slice, phi: torch.Tensor) -> None:
        """Count the tokens of one expert: phi `[num_tokens, d_ff_e]` for micro-experts `rows`."""
        squares = phi.square()
        self.square_sum[rows] += squares.sum(0, dtype=torch.float64)
        if len(phi):
            peak = squares.amax(0).double()
            self.square_max[rows] = torch.maximum(self.square_max[rows], peak)
        self.tokens[expert] += len(phi)
        if self.grams is not None:
            self.grams[expert].addmm_(phi.T, phi)

    def energies(self, down: torch.Tensor, alpha: float) -> torch.Tensor:
        """Eq. 11: `[(1-α)·Σφ² + α·max φ²] · ‖w_down‖²`.

        down: `[num_micro_experts, d_model]`, one row per micro-expert; returns float64
        `[num_micro_experts]`, 0 for experts that saw no token.
        """
        # In parts, because on a CPU the whole matrix would be copied to float64 at once.
        parts = (
            torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            for rows in down.split(ROWS_AT_ONCE)
        )
        norms = torch.cat(list(parts)).square()
        return ((1 - alpha) * self.square_sum + alpha * self.square_max) * norms


class Projections(NamedTuple):
    """What one expert makes of the tokens routed to it.

    rows: the expert's micro-experts; tokens: int64 `[num_tokens]`; weights: `[num_tokens]`, the
    routing weights; gate, up: `[num_tokens, d_ff_e]`.
    """

    rows: slice
    tokens: torch.Tensor
    weights: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor


class RoutedExpertsMeter(nn.Module):
    """Stands in for a layer's experts module and sums its coefficients.

    The down projection is not computed, for a run whose experts are to add nothing.
    """

    def __init__(self, experts: RaggedTier[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = len(experts.offsets) - 1
        self.sums = CoefficientSums.zeros(experts.offsets[-1], self.num_experts, device)

    @property
    def down(self) -> torch.Tensor:
        """The experts' down vectors, one row per micro-expert."""
        return self.experts.down

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[num_tokens, d_model]`, `[num_tokens, top_k]` twice -> nothing to add to the first."""
        for _ in self.projections(hidden_states, top_k_index, top_k_weights):
            pass
        return nothing(hidden_states)

    def projections(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Iterator[Projections]:
        """Sum the coefficients of `forward`'s arguments, and give what they are made of."""
        top_k = top_k_index.shape[1]
        order = torch.sort(top_k_index.flatten(), stable=True).indices
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        weights = top_k_weights.flatten()[order].split(counts)
        for expert, slots in enumerate(order.split(counts)):
            rows, tokens = self.experts.rows(expert), slots // top_k
            routed = hidden_states.index_select(0, tokens)
            gate = functional.linear(routed, self.experts.gate[rows])
            up = functional.linear(routed, self.experts.up[rows])
            self.sums.add(expert, rows, coefficients(gate, up, weights[expert]))
            yield Projections(rows, tokens, weights[expert], gate, up)


class MeasuredExperts(nn.Module):
    """The routed experts as they are, with a meter that sums their coefficients meanwhile."""

    def __init__(self, experts: RaggedTier[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.meter = RoutedExpertsMeter(experts, device)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What `ragged_moe` gives of the same experts, to the bit."""
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for part in self.meter.projections(hidden_states, top_k_index, top_k_weights):
            down, weights = self.meter.down[part.rows], part.weights[:, None]
            activations = functional.silu(part.gate) * part.up
            # No name for the product: it would be held while the next expert's is made.
            out.index_add_(0, part.tokens, (activations @ down).float() * weights)
        return out.to(hidden_states.dtype)


class SharedExpertMeter(nn.Module):
    """Stands in for a layer's shared experts and sums their coefficients; they add nothing.

    `routing_gate` `[1, d_model]` is the weight of Qwen2-MoE's sigmoid gate, None where the family
    adds the shared experts as they are.
    """

    shared: Any

    def __init__(self, shared: nn.Module, routing_gate: torch.Tensor | None) -> None:
        super().__init__()
        self.shared = shared
        self.routing_gate = routing_gate
        weight = self.shared.gate_proj.weight
        self.sums = CoefficientSums.zeros(weight.shape[0], 1, weight.device)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` -> nothing to add to it."""
        self.projections(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return nothing(hidden_states)

    def projections(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the coefficients of `[num_tokens, d_model]`; gate and up that they are made of."""
        gate, up = self.shared.gate_proj(tokens), self.shared.up_proj(tokens)
        self.sums.add(0, slice(None), coefficients(gate, up, self._routing_weight(tokens)))
        return gate, up

    def _routing_weight(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.routing_gate is None:
            return torch.ones(len(tokens), device=tokens.device)
        return torch.sigmoid(functional.linear(tokens, self.routing_gate)).squeeze(-1)


class MeasuredSharedExpert(nn.Module):
    """The shared experts as they are, with a meter that sums their coefficients meanwhile."""

    def __init__(self, shared: nn.Module, routing_gate: torch.Tensor | None) -> None:
        super().__init__()
        self.meter = SharedExpertMeter(shared, routing_gate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` -> what the shared experts themselves give, to the bit."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate, up = self.meter.projections(tokens)
        made = self.meter.shared.down_proj(functional.silu(gate) * up)
        return made.view(hidden_states.shape)
