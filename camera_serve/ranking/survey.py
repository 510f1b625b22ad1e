"""What every micro-expert of a model is worth, measured on the dense model in one pass.

A plan for the whole model has to compare micro-experts of different layers. What one of them adds
to the residual stream is worth the more, the smaller that stream is: so a layer counts by
1 / ‖h‖², the geometric mean over the calibration tokens, h being what leaves the layer. In each
expert, micro-experts are taken out one after another (`camera_serve.ranking.elimination`), the
others making up for them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from camera_serve.calibration.inputs import InputRecorder, RoutedInputs
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.models import MoeStructure
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.elimination import eliminate, shrunk
from camera_serve.ranking.gram import MIN_TOKENS, WIDEST
from camera_serve.ranking.layer import Measured, run_measured
from camera_serve.ranking.selection import LayerEnergies, norms_of, worth_of
from camera_serve.recipe import Recipe

SURVEYED_SHARE = 4
"""One calibration window in so many is surveyed where what a survey finds is looked at again."""

TOKENS_OF_AN_EXPERT = 256
"""But as many windows as give each expert so many tokens on average, if there are."""


def surveyed_share(structure: MoeStructure, recipe: Recipe) -> float:
    """The share of the calibration windows, the first, that a survey sees.

    How many micro-experts of each expert a plan keeps takes fewer tokens to find than which: so a
    part is enough where these are chosen anew on all tokens, by refitting, or by the energies that
    a packed plan goes by. The order of the windows is one of chance.
    """
    widths = (structure.d_ff, structure.shared_d_ff)
    if not (recipe.packed or (recipe.refit and recipe.eliminates and max(widths) <= WIDEST)):
        return 1
    seen = recipe.calibration.num_tokens * structure.top_k / structure.num_experts
    return max(1 / SURVEYED_SHARE, min(1, TOKENS_OF_AN_EXPERT / seen))


_LOSS = "loss_at_bits_"

LossesOf = Callable[[RaggedTier[torch.Tensor], RoutedInputs], Mapping[int, float]]
"""Measures what bit-widths lose, on a layer's routed experts and what each was given."""


@dataclass(frozen=True)
class LayerSurvey:
    """What the micro-experts of one MoE layer are worth, expert by expert, the shared one last.

    energies: Eq. 11 with α = 0, Σφ² ‖w‖²; weight: of the layer, 1 / ‖h‖²; order[e]: int64
    `[d_ff_e]`, in which they are taken out of expert e; costs[e]: float64 `[d_ff_e]`, in the same
    order, never falling; norms[e]: float64 `[d_ff_e]`, ‖w‖²; apart: bool `[num_experts]`, false for
    one that goes by energy, as its Gram matrix says too little or it has none; losses: the share of
    what an expert gives that a bit-width loses, where it was measured.
    """

    energies: LayerEnergies
    weight: float
    order: tuple[torch.Tensor, ...]
    costs: tuple[torch.Tensor, ...]
    norms: tuple[torch.Tensor, ...]
    apart: torch.Tensor
    losses: Mapping[int, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, as a file holds it."""
        return {
            "experts": self.energies.experts,
            "shared": self.energies.shared,
            "tokens": self.energies.tokens,
            "weight": torch.tensor(self.weight, dtype=torch.float64),
            "order": torch.cat(self.order),
            "costs": torch.cat(self.costs),
            "norms": torch.cat(self.norms),
            "apart": self.apart,
            **{
                f"{_LOSS}{bits}": torch.tensor(loss, dtype=torch.float64)
                for bits, loss in self.losses.items()
            },
        }

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerSurvey":
        """What `tensors` gave."""
        energies = LayerEnergies(tensors["experts"], tensors["shared"], tensors["tokens"])
        widths = [len(part) for part in energies.per_expert]
        order, costs, norms = (tensors[name].split(widths) for name in ("order", "costs", "norms"))
        losses = {
            int(name.removeprefix(_LOSS)): float(loss)
            for name, loss in tensors.items()
            if name.startswith(_LOSS)
        }
        weight, apart = float(tensors["weight"]), tensors["apart"]
        return cls(energies, weight, order, costs, norms, apart, losses)

    @property
    def worth(self) -> list[torch.Tensor]:
        """Energies, as far as the calibration text tells (`worth_of`)."""
        return worth_of(self.energies, self.norms)

    def by_energy(self) -> "LayerSurvey":
        """The same where none is to make up for another: by rising energy they are taken out."""
        rising = [own.sort(stable=True) for own in self.energies.per_expert]
        order, costs = tuple(own.indices for own in rising), tuple(own.values for own in rising)
        apart = torch.ones_like(self.apart)
        return replace(self, order=order, costs=costs, apart=apart)

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
    losses_of: LossesOf | None = None,
) -> LayerSurvey:
    """Run the calibration tokens through one MoE layer of the dense model.

    hidden: `[samples, seq_len, d_model]`, the layer's input, which its output takes the place of;
    widest: wider experts are not taken apart, but ranked by energy; 0: none is; losses_of: what
    measures the losses of bit-widths here; None: nothing.
    """
    recorder = InputRecorder() if losses_of else None
    measured = run_measured(stream, layer, loaded, hidden, widest, recorder)
    survey = _survey(loaded, hidden, measured)
    if not losses_of or not recorder:
        return survey
    assert loaded.experts is not None
    inputs = recorder.routed(stream.structure.num_experts)
    return replace(survey, losses=losses_of(loaded.experts, inputs))


@torch.inference_mode()
def analyze_layer(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    alpha: float,
) -> tuple[LayerEnergies, LayerSurvey]:
    """As `survey_layer`, with the layer's energies at `alpha` out of the same run."""
    measured = run_measured(stream, layer, loaded, hidden, WIDEST)
    return measured.energies(alpha), _survey(loaded, hidden, measured)


def _survey(loaded: StreamedLayer, output: torch.Tensor, measured: Measured) -> LayerSurvey:
    """What a layer's micro-experts are worth, from its output and what was measured on the way."""
    assert loaded.experts is not None
    energies, scale, grams = measured.energies(0.0), measured.scale, measured.grams
    down = loaded.experts.down.view(*energies.experts.shape, -1)
    norms = list(norms_of(down.flatten(0, 1)).view(energies.experts.shape))
    found = list(_removals(energies.experts, grams[0], down, energies.tokens, scale))
    if loaded.shared is not None:
        down = loaded.shared.down_proj.weight.T[None]
        every = torch.tensor([output.shape[:-1].numel()])
        norms.append(norms_of(down[0]))
        found += _removals(energies.shared[None], grams[1], down, every, 1.0)
    order, costs, apart = zip(*found, strict=True)
    by_pairs, weight = torch.tensor(apart), _weight_of(output)
    return LayerSurvey(energies, weight, order, costs, tuple(norms), by_pairs)


def _weight_of(hidden: torch.Tensor) -> float:
    """1 / ‖h‖², the geometric mean over tokens: no single token decides, however large or small.

    In a sum, massive activations of a few tokens (Sun et al., 2024) would be all that counts.
    """
    sizes = torch.cat([batch.float().square().sum(-1) for batch in hidden]).double()
    seen = sizes[sizes > 0]
    return float(seen.log().mean().neg().exp()) if len(seen) else 1.0


def _removals(
    energies: torch.Tensor,
    grams: torch.Tensor | None,
    down: torch.Tensor,
    tokens: torch.Tensor,
    scale: float,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Order and costs of taking micro-experts out of each expert, and whether it is by their pairs.

    energies: float64 `[num_experts, d_ff]`; down: `[num_experts, d_ff, d_model]`; tokens: what each
    expert saw; scale: of what they add. Experts too wide or too little seen for a Gram matrix, or
    whose Gram matrix cannot be factored, go by energy, as if none could make up for another.
    """
    for expert, own in enumerate(energies):
        found, num_tokens = None, int(tokens[expert])
        if grams is not None and num_tokens >= MIN_TOKENS:
            found = eliminate(shrunk(grams[expert], num_tokens)[None], down[expert, None])
        if found is None or not found.costs.isfinite().all():
            rising = own.sort(stable=True)
            yield rising.indices, rising.values, False
        else:
            yield found.order[0].cpu(), scale**2 * found.costs[0].cpu(), True
