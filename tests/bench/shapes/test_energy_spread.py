import math

import pytest
import torch

from bench.shapes.energy_spread import EnergySpread, LayerSpread, kept_shares, kept_work
from camera_serve.ranking.selection import LayerEnergies

SPREAD = LayerSpread(
    between_std=2.0,
    within_std=1.5,
    shared_mean=1.0,
    shared_std=0.5,
    load_variation=0.6,
    load_correlation=0.8,
    kept_share_std={},
    kept_work={},
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_drawn_layer_has_the_spread_it_was_drawn_with() -> None:
    found = LayerSpread.of(SPREAD.draw(4000, 64, 20000, _generator()))
    # 4000 experts: standard deviations are known to 1.1%, that of a log-normal's to some percent.
    assert found.between_std == pytest.approx(2.0, rel=0.05)
    assert found.within_std == pytest.approx(1.5, rel=0.02)
    assert found.shared_mean == pytest.approx(1.0, abs=0.15)
    assert found.shared_std == pytest.approx(0.5, rel=0.03)
    assert found.load_variation == pytest.approx(0.6, rel=0.1)
    assert found.load_correlation == pytest.approx(0.8, abs=0.03)


def test_draws_follow_their_generator_alone() -> None:
    one, same, other = (SPREAD.draw(4, 8, 0, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.experts, same.experts) and torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.experts, other.experts)
    assert one.shared.shape == (0,)


def test_what_is_left_counts_by_the_tokens_of_its_expert() -> None:
    experts = torch.tensor([[9.0, 8, 7, 1], [6, 5, 2, 3], [0.1, 0.2, 0.3, 4]])
    energies = LayerEnergies(experts, torch.tensor([10.0, 0.05, 0.06]), torch.tensor([6, 3, 1]))
    # 15 micro-experts, the last 9 go: kept are 10 (shared), 9, 8, 7, 6, 5.
    assert kept_shares(energies, 60).tolist() == [0.75, 0.5, 0]
    assert kept_work(energies, 60) == pytest.approx((6 * 0.75 + 3 * 0.5) / 10)


def test_micro_experts_without_energy_do_not_make_the_spread_infinite() -> None:
    drawn = SPREAD.draw(8, 32, 32, _generator())
    drawn.experts[0, :4] = 0
    found = LayerSpread.of(drawn).model_dump()
    assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))


@pytest.mark.parametrize("layer", range(4))
def test_drawn_layers_are_pruned_as_unevenly_as_the_measured_ones(layer: int) -> None:
    spread = EnergySpread.stored().layers[layer]
    # The reference MoE's own sizes.
    drawn = [spread.draw(16, 128, 128, _generator(seed)) for seed in range(40)]
    uneven = sum(float(kept_shares(d, 40).std()) for d in drawn) / len(drawn)
    work = sum(kept_work(d, 40) for d in drawn) / len(drawn)
    # Its energies are not quite normal; at 40% removed it matters less than this.
    assert uneven == pytest.approx(spread.kept_share_std["40%"], abs=0.06)
    assert work == pytest.approx(spread.kept_work["40%"], abs=0.06)
