import pytest
import torch

from bench.shapes.published import SHAPES, layer_counts
from bench.speed.contestants import (
    DenseWeights,
    camera,
    dequantized,
    fitting,
    has_zentorch,
    name_of,
    random_layer,
    stock_contestants,
)
from bench.speed.kernels import relative_error
from bench.speed.moe_inputs import inputs_of
from camera_serve.errors import CameraError
from camera_serve.ragged.layer import PackedRows
from camera_serve.recipe import TierPlan

TINY = SHAPES["qwen3-30b-a3b"].model_copy(
    update={"num_experts": 8, "top_k": 2, "d_ff": 256, "d_model": 256}
)
MIXED = TierPlan.parse("16:0.1,3:0.2,2:0.5,0:0.2")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_layer_has_the_plan_s_tiers_and_16_bit_rows_are_the_dense_experts_own() -> None:
    dense = DenseWeights.random(TINY, generator())
    layer = random_layer(TINY, MIXED, 3, dense, generator())
    counts = torch.tensor([tier.offsets for tier in layer.tiers]).diff(dim=1).T
    assert counts.tolist() == [list(tiers) for tiers in layer_counts(TINY, MIXED, 3).experts]
    whole, *packed = layer.tiers
    assert [tier.gate.bits for tier in packed if isinstance(tier.gate, PackedRows)] == [3, 2]
    expert = int(counts[:, 0].argmax())
    rows, width = whole.rows(expert), int(counts[expert, 0])
    assert width > 0
    assert torch.equal(whole.gate[rows], dense.w13[expert, :width])
    assert torch.equal(whole.up[rows], dense.w13[expert, 256 : 256 + width])
    assert torch.equal(whole.down[rows], dense.w2[expert, :, :width].T)


def test_random_codes_weigh_about_as_much_as_dense_rows() -> None:
    dense = DenseWeights.random(TINY, generator())
    for bits in (8, 4, 3, 2, 1):
        layer = random_layer(TINY, TierPlan.parse(f"{bits}:1"), 0, dense, generator())
        packed = layer.tiers[0].gate
        assert isinstance(packed, PackedRows)
        weights = packed.dequantize(slice(None), torch.float32)
        # Scales vary by a factor of three: their mean square is 1.08, of 4096 groups.
        assert float(weights.std()) * TINY.d_model**0.5 == pytest.approx(1.08**0.5, rel=0.02)
        assert abs(float(weights.mean())) < 0.01 * float(weights.std())


def test_bytes_and_width_of_an_expert_are_those_of_its_tiers() -> None:
    dense = DenseWeights.random(TINY, generator())
    ours = camera(random_layer(TINY, MIXED, 0, dense, generator()), MIXED, TINY.d_model)
    for expert, (n16, n3, n2) in enumerate(layer_counts(TINY, MIXED, 0).experts):
        # Rows of 256 weights: 512 bytes, or 3 or 2 bits each and two groups of 4 bytes.
        expected = 3 * (512 * n16 + (96 + 8) * n3 + (64 + 8) * n2)
        assert ours.expert_bytes[expert] == expected
        assert ours.expert_d_ff[expert] == n16 + n3 + n2


def test_a_dequantized_layer_has_the_tiers_of_an_expert_side_by_side() -> None:
    dense = DenseWeights.random(TINY, generator())
    layer = random_layer(TINY, MIXED, 3, dense, generator())
    found = dequantized(layer, TINY)
    widths = torch.tensor([tier.offsets for tier in layer.tiers]).diff(dim=1).sum(0).tolist()
    width, expert = min((width, expert) for expert, width in enumerate(widths))
    assert 0 < width < TINY.d_ff
    assert not found.w13[expert, width : TINY.d_ff].any()
    assert not found.w2[expert, :, width:].any()
    at = 0
    for tier in layer.tiers:
        rows = tier.rows(expert)
        gate, up, down = (
            m.dequantize(rows, torch.bfloat16) if isinstance(m, PackedRows) else m[rows]
            for m in (tier.gate, tier.up, tier.down)
        )
        span = slice(at, at := at + len(gate))
        assert torch.equal(found.w13[expert, span], gate)
        assert torch.equal(found.w13[expert, TINY.d_ff :][span], up)
        assert torch.equal(found.w2[expert, :, span], down.T)


def test_stock_kernels_compute_the_whole_layer() -> None:
    dense = DenseWeights.random(TINY, generator())
    plan = TierPlan.parse("16:1")
    whole = random_layer(TINY, plan, 0, dense, generator())
    inputs = [next(inputs_of(TINY, tokens, "even", 0)) for tokens in (1, 33)]
    errors = {c.name: relative_error(c.run, whole, inputs) for c in stock_contestants(dense)}
    # bf16 rounds by 2^-9; 8 bits of a row's largest weight by 1%, 4 bits of a group's by 10%,
    # three times in a row.
    bounds = {"vLLM's own": 4e-3, "zentorch": 6e-3, "zentorch int8": 5e-2, "zentorch int4": 0.25}
    assert set(errors) == (set(bounds) if has_zentorch() else {"vLLM's own"})
    assert all(error < bounds[name] for name, error in errors.items())


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ("16:1", "λ = 0%"),
        ("16:0.6,0:0.4", "λ = 40%"),
        ("16:0.875,0:0.125", "λ = 12.5%"),
        ("3:0.2,2:0.6,1:0.2", "2.25 bits"),
        ("8:1", "8.25 bits"),
        ("4:0.5,0:0.5", "4:0.5,0:0.5"),
    ],
)
def test_a_plan_is_called_by_what_it_does(plan: str, name: str) -> None:
    assert name_of(TierPlan.parse(plan)) == name


def test_experts_are_dropped_until_the_layer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [TierPlan.parse("16:1"), TierPlan.parse("16:0.5,0:0.5")]
    monkeypatch.setattr("bench.speed.contestants.has_zentorch", lambda: False)
    # Of each weight: 2 bytes raw, 2 in vLLM's kernel, 2 and 1 in ours, 2 while one is packed.
    expert = 3 * TINY.d_ff * TINY.d_model * 9
    assert fitting(TINY, plans, int(8 * expert)).num_experts == 8
    assert fitting(TINY, plans, int(100 * expert)).num_experts == 8
    assert fitting(TINY, plans, int(8 * expert) - 1).num_experts == 7
    with pytest.raises(CameraError, match="hold 1 experts in every contestant, and a token needs"):
        fitting(TINY, plans, int(2 * expert) - 1)
    # zentorch's kernels hold more than all others together.
    monkeypatch.setattr("bench.speed.contestants.has_zentorch", lambda: True)
    assert fitting(TINY, plans, int(8 * expert)).num_experts == 3
