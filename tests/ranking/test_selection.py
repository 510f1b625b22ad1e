import torch

from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.selection import LayerEnergies, chosen_anew, select, select_rows
from camera_serve.recipe import TierPlan

ENERGIES = LayerEnergies(
    experts=torch.tensor([[1.0, 9.0, 2.0, 8.0], [0.0, 0.0, 0.0, 7.0]]),
    shared=torch.tensor([6.0, 0.5, 0.25, 0.75]),
    tokens=torch.tensor([3, 1]),
)


def test_the_kept_stand_by_falling_energy_in_tiers_over_all_experts() -> None:
    selection = select(ENERGIES, TierPlan.parse("16:0.25,2:0.25,0:0.5"), align=1)
    assert selection.layout.experts == ((2, 2), (1, 0))
    assert selection.layout.shared == ((0, 1),)
    assert [rows.tolist() for rows in selection.experts] == [[1, 3, 2, 0], [3]]
    assert [rows.tolist() for rows in selection.shared] == [[0]]
    assert selection.energy_kept == 33 / 34.5


def test_other_energies_fill_the_same_tiers_anew() -> None:
    selection = select(ENERGIES, TierPlan.parse("16:0.25,2:0.25,0:0.5"), align=1)
    others = LayerEnergies(
        experts=torch.tensor([[5.0, 1.0, 2.0, 3.0], [0.0, 4.0, 1.0, 0.0]]),
        shared=torch.tensor([0.0, 0.0, 2.0, 2.0]),
        tokens=ENERGIES.tokens,
    )
    # Vectors of no size add nothing to what an energy says.
    norms = [torch.zeros(len(own), dtype=torch.float64) for own in others.per_expert]
    again = chosen_anew(others, norms, selection)
    assert again.layout == selection.layout
    assert [rows.tolist() for rows in again.experts] == [[0, 3, 2, 1], [1]]
    assert [rows.tolist() for rows in again.shared] == [[2]]
    assert again.energy_kept == 17 / 20


def test_select_rows_keeps_order_and_empties_experts() -> None:
    rows = torch.arange(12.0).view(6, 2)
    experts = RaggedTier(rows, rows + 100, rows + 200, offsets=(0, 2, 4, 6))
    kept = [torch.tensor([1, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    narrow = select_rows(experts, kept, torch.device("cpu"))
    assert narrow.offsets == (0, 2, 2, 3)
    assert narrow.gate.equal(rows[[1, 0, 5]])
    assert narrow.up.equal(rows[[1, 0, 5]] + 100)
    assert narrow.down.equal(rows[[1, 0, 5]] + 200)
