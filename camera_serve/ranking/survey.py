"""What every micro-expert of a model is worth, measured on the dense model in one pass.

A plan for the whole model has to compare micro-experts of different layers. What one of them adds
to the residual stream is worth the more, the smaller that stream is: so a layer counts by
1 / Σ ‖h‖² over the calibration tokens, h being what leaves the layer. In each expert,
micro-experts are taken out one after another (`camera_serve.ranking.elimination`), the others
making up for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from camera_serve.calibration.inputs import InputRecorder, RoutedInputs, inputs_of_shared
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.elimination import eliminate
from camera_serve.ranking.gram import MIN_TOKENS, WIDEST, gram_of
from camera_serve.ranking.layer import run_measured, scale_of_routed
from camera_serve.ranking.selection import LayerEnergies


@dataclass(frozen=True)
class LayerSurvey:
    """What the micro-experts of one MoE layer are worth, expert by expert, the shared one last.

    energies: Eq. 11 with α = 0, Σφ² ‖w‖²; weight: of the layer, 1 / Σ ‖h‖²; order[e]: int64
    `[d_ff_e]`, in which they are taken out of expert e; costs[e]: float64 `[d_ff_e]`, in the same
    order, never falling.
    """

    energies: LayerEnergies
    weight: float
    order: tuple[torch.Tensor, ...]
    costs: tuple[torch.Tensor, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, as a file holds it."""
        return {
            "experts": self.energies.experts,
            "shared": self.energies.shared,
            "tokens": self.energies.tokens,
            "weight": torch.tensor(self.weight, dtype=torch.float64),
            "order": torch.cat(self.order),
            "costs": torch.cat(self.costs),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerSurvey":
        """What `tensors` gave."""
        energies = LayerEnergies(tensors["experts"], tensors["shared"], tensors["tokens"])
        widths = [len(part) for part in energies.per_expert]
        order, costs = tensors["order"].split(widths), tensors["costs"].split(widths)
        return cls(energies, float(tensors["weight"]), order, costs)

    @property
    def removal_scores(self) -> list[torch.Tensor]:
        """What each micro-expert costs when it is taken out, by its own index."""
        return [
            torch.empty_like(costs).scatter_(0, order, costs)
            for order, costs in zip(self.order, self.costs, strict=True)
        ]


@torch.inference_mode()
def survey_layer(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    widest: int = WIDEST,
) -> LayerSurvey:
    """Run the calibration tokens through one MoE layer of the dense model.

    hidden: `[samples, seq_len, d_model]`, the layer's input, which its output takes the place of;
    widest: wider experts are not taken apart, but ranked by energy; 0: none is.
    """
    assert loaded.experts is not None
    scale = scale_of_routed(loaded, stream.structure.moe_prefix(layer))
    recorder = InputRecorder()
    energies = run_measured(stream, layer, loaded, hidden, 0.0, recorder)
    inputs = recorder.routed(stream.structure.num_experts)
    unscaled = list(energies.experts / scale**2)
    removals = _removals(loaded.experts, unscaled, inputs, widest, stream.device)
    found = [(order, scale**2 * costs) for order, costs in removals]
    if loaded.shared is not None:
        shared = loaded.shared
        rows = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T)
        whole = RaggedTier(*rows, offsets=(0, len(rows[0])))
        of_shared = inputs_of_shared(inputs, loaded.shared_gate)
        found += _removals(whole, [energies.shared], of_shared, widest, stream.device)
    size = sum(float(batch.float().square().sum()) for batch in hidden)
    order, costs = zip(*found, strict=True)
    return LayerSurvey(energies, 1 / max(size, 1e-300), order, costs)


def _removals(
    experts: RaggedTier[torch.Tensor],
    energies: list[torch.Tensor],
    inputs: RoutedInputs,
    widest: int,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Order and costs of taking micro-experts out of each expert.

    Experts too wide or too little seen for a Gram matrix go by energy, as if none could make up
    for another.
    """
    for expert, own in enumerate(energies):
        rows = experts.rows(expert)
        if len(own) > widest or len(inputs.tokens[expert]) < MIN_TOKENS:
            rising = own.sort(stable=True)
            yield rising.indices, rising.values
            continue
        gate, up, down = (
            matrix[rows].to(device, torch.float32)
            for matrix in (experts.gate, experts.up, experts.down)
        )
        gram = gram_of((gate, up), inputs, expert, device)
        (order,), (costs,) = eliminate(gram[None], down[None])
        yield order.cpu(), costs.cpu()
