"""How far what is left of a layer's experts is from what the whole ones give.

Judged on the last calibration tokens, which down is never fitted to (`RoutedInputs.split`), as they
leave the compressed layers before: ‖y - ŷ‖² / Σ_j E_j, y being what all experts of the layer, the
shared one too, add to a token, E_j = Σφ_j² ‖w_j‖² the energy of a micro-expert on the same tokens.
That is the measure in which losses are predicted.
"""

from dataclasses import dataclass
from typing import Any

import torch

from camera_serve.calibration.inputs import HELD_BACK, RoutedInputs
from camera_serve.calibration.streaming import StreamedLayer
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.gram import TOKENS_AT_ONCE, phi_of

MOST_TOKENS = 4096
"""Judged on at most: enough for two digits, and their outputs are held for a layer."""


@dataclass(frozen=True)
class Whole:
    """What the experts of a layer give each token before any of them is compressed.

    inputs, of_shared: those of the routed and of the shared experts; scale: what the layer
    multiplies its routed experts' output by; outputs: float32 `[num_tokens, d_model]`; energy:
    Σ_j E_j.
    """

    inputs: RoutedInputs
    of_shared: RoutedInputs | None
    scale: float
    outputs: torch.Tensor
    energy: float

    @classmethod
    def of(
        cls,
        loaded: StreamedLayer,
        inputs: RoutedInputs,
        of_shared: RoutedInputs | None,
        scale: float,
        device: torch.device,
    ) -> "Whole":
        """The experts of `loaded`."""
        assert loaded.experts is not None
        shared = rows_of_shared(loaded.shared) if of_shared else None
        outputs, energy = _outputs(loaded.experts, inputs, shared, of_shared, scale, device)
        return cls(inputs, of_shared, scale, outputs, energy)

    def lacking(
        self, experts: RaggedTier[torch.Tensor], shared: RaggedTier[torch.Tensor] | None
    ) -> torch.Tensor:
        """y - ŷ of what is left, float32 `[num_tokens, d_model]`."""
        device = self.outputs.device
        made, _ = _outputs(experts, self.inputs, shared, self.of_shared, self.scale, device)
        return made.neg_().add_(self.outputs)

    def error(
        self, experts: RaggedTier[torch.Tensor], shared: RaggedTier[torch.Tensor] | None
    ) -> float | None:
        """‖y - ŷ‖² / Σ_j E_j of what is left; None where the whole ones gave nothing."""
        if not self.energy > 0:
            return None
        lost = self.lacking(experts, shared).square().sum(dtype=torch.float64)
        return float(lost) / self.energy


def judging_tokens(
    inputs: RoutedInputs, of_shared: RoutedInputs | None
) -> tuple[RoutedInputs, RoutedInputs | None]:
    """Of what experts are given the part that they are judged on."""
    count = min(len(inputs.x) // HELD_BACK, MOST_TOKENS)
    return inputs.last(count), of_shared and of_shared.last(count)


def rows_of_shared(shared: Any) -> RaggedTier[torch.Tensor]:
    """A shared expert's three linear layers as the rows of one expert."""
    gate, up, down = shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T
    return RaggedTier(gate, up, down, (0, len(gate)))


def _outputs(
    experts: RaggedTier[torch.Tensor],
    inputs: RoutedInputs,
    shared: RaggedTier[torch.Tensor] | None,
    of_shared: RoutedInputs | None,
    scale: float,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """What a layer's experts add to each token, float32 `[num_tokens, d_model]`, and Σ_j E_j.

    scale: what the layer multiplies its routed experts' output by.
    """
    outputs = torch.zeros(inputs.x.shape, dtype=torch.float32, device=device)
    energy = _add(outputs, experts, inputs, scale)
    if shared and of_shared:
        energy += _add(outputs, shared, of_shared, 1.0)
    return outputs, energy


def _add(
    outputs: torch.Tensor, experts: RaggedTier[torch.Tensor], inputs: RoutedInputs, scale: float
) -> float:
    """Add what some experts make of their tokens, in place; Σ_j E_j."""
    energy = 0.0
    for expert in range(len(experts.offsets) - 1):
        rows, tokens = experts.rows(expert), inputs.tokens[expert]
        if rows.start == rows.stop or not len(tokens):
            continue
        gate, up, down = (
            matrix[rows].to(outputs.device, torch.float32)
            for matrix in (experts.gate, experts.up, experts.down)
        )
        norms = down.square().sum(1, dtype=torch.float64)
        batches = inputs.batches(expert, TOKENS_AT_ONCE, outputs.device)
        for some, (x, weights) in zip(tokens.split(TOKENS_AT_ONCE), batches, strict=True):
            phi = scale * phi_of((gate, up), x, weights)
            outputs.index_add_(0, some.to(outputs.device), phi @ down)
            energy += float(phi.square().sum(0, dtype=torch.float64) @ norms)
    return energy
