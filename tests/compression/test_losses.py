"""What bit-widths lose of an expert, measured as `compress` quantizes and on other tokens."""

import itertools

import pytest
import torch
from torch.nn import functional

from camera_serve import Calibration, Recipe, TierPlan
from camera_serve.calibration.inputs import InputRecorder, RoutedInputs
from camera_serve.compression.losses import ENOUGH, layers_to_measure, measure_losses
from camera_serve.compression.quantize.experts import quantize_experts
from camera_serve.ragged.layer import RaggedTier

CPU = torch.device("cpu")
D_FF, D_MODEL, NUM_EXPERTS = 24, 64, 3
SEEN_MOST = 1


def _recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "bits_per_weight": 2.5,
        "calibration": Calibration(source="x"),
        "group_size": 32,
    }
    return Recipe.model_validate(settings | changes)


def _layer(num_tokens: int) -> tuple[RaggedTier[torch.Tensor], RoutedInputs]:
    """Three experts, of which the second one sees every token."""
    generator = torch.Generator().manual_seed(0)
    rows = (NUM_EXPERTS * D_FF, D_MODEL)
    gate, up, down = (torch.randn(rows, generator=generator) * 0.2 for _ in range(3))
    x = torch.randn(num_tokens, 16, generator=generator) @ torch.randn(
        16, D_MODEL, generator=generator
    )
    other = torch.randint(0, 2, (num_tokens, 1), generator=generator) * 2
    ids = torch.cat([torch.full_like(other, SEEN_MOST), other], dim=1)
    recorder = InputRecorder()
    recorder(torch.nn.Identity(), (x, ids, torch.rand(num_tokens, 2, generator=generator)))
    offsets = tuple(range(0, NUM_EXPERTS * D_FF + 1, D_FF))
    return RaggedTier(gate, up, down, offsets), recorder.routed(NUM_EXPERTS)


def test_it_is_the_error_of_the_quantized_expert_on_tokens_it_was_not_fitted_to() -> None:
    experts, inputs = _layer(16 * ENOUGH)
    found = measure_losses(experts, inputs, _recipe(allow=(16, 3, 1)), CPU)
    assert found.keys() == {3, 1}
    rows = experts.rows(SEEN_MOST)
    gate, up, down = (m[rows].double() for m in (experts.gate, experts.up, experts.down))
    border = 14 * ENOUGH
    x, weights = inputs.x[border:].double(), inputs.weights[SEEN_MOST][border:].double()
    phi = functional.silu(x @ gate.T) * (x @ up.T) * weights[:, None]
    given = (phi @ down).square().sum()
    alone = RoutedInputs(inputs.x, (torch.arange(border),), (inputs.weights[SEEN_MOST][:border],))
    for bits, share in found.items():
        (solved,) = quantize_experts(
            RaggedTier(*(m.float() for m in (gate, up, down)), (0, D_FF)),
            torch.full((D_FF,), bits),
            alone,
            group_size=32,
            solver="gptq",
            weighted=True,
            refit=True,
            device=CPU,
        )
        own = [solved.rows[p].dequantize().double() for p in ("gate", "up", "down")]
        made = functional.silu(x @ own[0].T) * (x @ own[1].T) * weights[:, None]
        error = (made @ own[2] - phi @ down).square().sum()
        assert share == pytest.approx(float(error / given), rel=1e-3)
    assert 0 < found[3] < found[1]


def test_the_experts_stay_as_they_are() -> None:
    experts, inputs = _layer(16 * ENOUGH)
    before = [m.clone() for m in (experts.gate, experts.up, experts.down)]
    measure_losses(experts, inputs, _recipe(), CPU)
    assert all(map(torch.equal, before, (experts.gate, experts.up, experts.down)))


def test_too_few_tokens_measure_nothing() -> None:
    assert not measure_losses(*_layer(8 * ENOUGH - 8), _recipe(), CPU)
    assert measure_losses(*_layer(8 * ENOUGH), _recipe(), CPU)


def test_an_expert_that_gives_nothing_measures_nothing() -> None:
    experts, inputs = _layer(16 * ENOUGH)
    experts.down.zero_()
    assert not measure_losses(experts, inputs, _recipe(), CPU)


@pytest.mark.parametrize("num_experts", [4, 8, 16, 128])
@pytest.mark.parametrize("num_layers", [1, 3, 4, 48])
def test_measuring_is_a_small_part_of_the_run(num_experts: int, num_layers: int) -> None:
    layers = range(1, num_layers + 1)
    measured = layers_to_measure(layers, num_experts, _recipe())
    assert 1 <= len(measured) <= num_layers and measured <= set(layers)
    assert len(measured) == 1 or 4 * len(measured) <= 0.1 * num_experts * num_layers
    # Evenly spread: no two neighbours twice as far apart as they might be.
    ends = sorted(measured)
    gaps = [later - first for first, later in itertools.pairwise(ends)]
    assert not gaps or max(gaps) <= 2 * num_layers / len(measured)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits_per_weight": None, "plan": TierPlan.parse("3:0.5,2:0.5")},
        {"allow": (16, 0)},
        {"allow": (16, 8, 0)},
    ],
)
def test_nothing_is_measured_that_decides_nothing(settings: dict[str, object]) -> None:
    assert not layers_to_measure(range(8), 128, _recipe(**settings))
