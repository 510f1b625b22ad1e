from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from camera_serve.calibration.inputs import InputRecorder, RoutedInputs, every_token
from camera_serve.compression.quantize import cost
from camera_serve.compression.quantize import experts as experts_module
from camera_serve.compression.quantize.experts import QuantizedExpert, _tempered, quantize_experts
from camera_serve.compression.quantize.held_back import HeldBack
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import QuantizedRows, RaggedTier

D_MODEL = 64
CPU = torch.device("cpu")


def make(widths: list[int], num_tokens: int = 400) -> tuple[RaggedTier[torch.Tensor], RoutedInputs]:
    offsets = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
    gate, up, down = (torch.randn(sum(widths), D_MODEL) * 0.1 for _ in range(3))
    x = torch.randn(num_tokens, 24) @ torch.randn(24, D_MODEL)
    ids = torch.randint(0, len(widths), (num_tokens, 1))
    weights = torch.rand(num_tokens, 1)
    recorder = InputRecorder()
    for part in (slice(0, 150), slice(150, None)):
        recorder(torch.nn.Identity(), (x[part], ids[part], weights[part]))
    return RaggedTier(gate, up, down, offsets), recorder.routed(len(widths))


def only(inputs: RoutedInputs, expert: int) -> RoutedInputs:
    return RoutedInputs(inputs.x, (inputs.tokens[expert],), (inputs.weights[expert],))


@dataclass(frozen=True)
class Solved:
    """All quantized rows of a layer, expert by expert."""

    gate: QuantizedRows
    up: QuantizedRows
    down: QuantizedRows
    widths: dict[int, int]
    rounded: list[int]


def solve(
    experts: RaggedTier[torch.Tensor], bits: list[int], inputs: RoutedInputs, solver: str = "gptq"
) -> Iterator[QuantizedExpert]:
    return quantize_experts(
        experts,
        torch.tensor(bits),
        inputs,
        group_size=32,
        solver=solver,  # type: ignore[arg-type]
        device=CPU,
    )


def quantize(
    experts: RaggedTier[torch.Tensor], bits: list[int], inputs: RoutedInputs, solver: str = "gptq"
) -> Solved:
    return together(list(solve(experts, bits, inputs, solver)))


def together(parts: list[QuantizedExpert]) -> Solved:
    rows = {
        p: QuantizedRows(
            torch.cat([part.rows[p].codes for part in parts]),
            torch.cat([part.rows[p].scales for part in parts]),
            torch.cat([part.rows[p].zeros for part in parts]),
        )
        for p in PROJECTIONS
    }
    widths = {part.expert: len(part.rows["gate"].codes) for part in parts}
    return Solved(**rows, widths=widths, rounded=[p.expert for p in parts if p.rounded])


def output_error(experts: RaggedTier[torch.Tensor], solved: Solved, inputs: RoutedInputs) -> float:
    """Squared error of all experts' outputs on their own tokens, relative to the outputs."""
    gate, up, down = (q.dequantize() for q in (solved.gate, solved.up, solved.down))
    wrong = total = 0.0
    for expert in range(len(experts.offsets) - 1):
        x, rows = inputs.x[inputs.tokens[expert]].float(), experts.rows(expert)
        y = (functional.silu(x @ experts.gate[rows].T) * (x @ experts.up[rows].T)) @ experts.down[
            rows
        ]
        ours = (functional.silu(x @ gate[rows].T) * (x @ up[rows].T)) @ down[rows]
        wrong += (y - ours).square().sum().item()
        total += y.square().sum().item()
    return wrong / total


def test_inputs_are_sorted_to_the_experts_they_were_routed_to() -> None:
    recorder = InputRecorder()
    x = torch.arange(8.0).view(4, 2)
    recorder(torch.nn.Identity(), (x[:3], torch.tensor([[0, 2], [2, 1], [1, 0]]), torch.ones(3, 2)))
    recorder(torch.nn.Identity(), (x[3:], torch.tensor([[2, 0]]), torch.ones(1, 2)))
    inputs = recorder.routed(4)
    assert [tokens.tolist() for tokens in inputs.tokens] == [[0, 2, 3], [1, 2], [0, 1, 3], []]
    assert inputs.x.equal(x)
    (every,) = every_token(inputs).tokens
    assert every.tolist() == [0, 1, 2, 3]


def test_gptq_beats_rounding_on_the_layer_output() -> None:
    experts, inputs = make([32, 32, 32])
    bits = ([3] * 8 + [2] * 16 + [1] * 8) * 3
    errors = {
        s: output_error(experts, quantize(experts, bits, inputs, s), inputs)
        for s in ("gptq", "rtn")
    }
    assert errors["gptq"] < 0.75 * errors["rtn"]


def test_more_bits_mean_less_error() -> None:
    experts, inputs = make([32, 32])
    errors = [
        output_error(experts, quantize(experts, [b] * 64, inputs), inputs) for b in (1, 2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


@pytest.mark.parametrize("widths", [[0, 1, 7, 32], [0, 40, 0], [1]])
def test_ragged_widths_are_solved_as_if_alone(widths: list[int]) -> None:
    experts, inputs = make(widths)
    bits = [2] * sum(widths)
    whole = quantize(experts, bits, inputs)
    assert whole.widths == {e: width for e, width in enumerate(widths) if width}
    for expert, width in enumerate(widths):
        if not width:
            continue
        rows = experts.rows(expert)
        one = RaggedTier(experts.gate[rows], experts.up[rows], experts.down[rows], (0, width))
        alone = quantize(one, [2] * width, only(inputs, expert))
        for name in ("gate", "up", "down"):
            codes = getattr(whole, name).codes[rows]
            assert (codes != getattr(alone, name).codes).float().mean() < 0.005


def test_rows_of_16_bits_are_left_out() -> None:
    experts, inputs = make([8, 8])
    solved = quantize(experts, ([16] * 3 + [4] * 5) * 2, inputs)
    assert solved.widths == {0: 5, 1: 5}
    assert len(solved.gate.codes) == len(solved.down.scales) == 10
    difference = solved.gate.dequantize()[:5] - experts.gate[3:8]
    assert difference.abs().mean() < 0.05 * experts.gate.abs().mean() * 4


def test_an_expert_that_saw_too_few_tokens_is_rounded_and_named() -> None:
    experts, inputs = make([16, 16])
    few = RoutedInputs(
        inputs.x,
        (inputs.tokens[0], inputs.tokens[1][:5]),
        (inputs.weights[0], inputs.weights[1][:5]),
    )
    solved, rounded = quantize(experts, [2] * 32, few), quantize(experts, [2] * 32, few, "rtn")
    assert solved.rounded == [1]
    assert solved.gate.codes[16:].equal(rounded.gate.codes[16:])
    assert not solved.gate.codes[:16].equal(rounded.gate.codes[:16])


def test_chunks_of_experts_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = make([16] * 5)
    whole = quantize(experts, [2] * 80, inputs)
    monkeypatch.setattr(cost, "SOLVER_BYTES", 1)
    parts = quantize(experts, [2] * 80, inputs)
    for name in ("gate", "up", "down"):
        assert (getattr(whole, name).codes != getattr(parts, name).codes).float().mean() < 0.01


def test_experts_without_a_packed_row_give_no_codes() -> None:
    experts, inputs = make([4, 4])
    assert list(solve(experts, [16] * 8, inputs)) == []


def test_an_expert_may_be_overwritten_once_it_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = make([16] * 3)
    monkeypatch.setattr(cost, "SOLVER_BYTES", 1)
    wanted, parts = quantize(experts, [2] * 48, inputs), []
    for part in solve(experts, [2] * 48, inputs):
        for matrix in (experts.gate, experts.up, experts.down):
            matrix[experts.rows(part.expert)] = torch.nan
        parts.append(part)
    found = together(parts)
    for name in PROJECTIONS:
        assert getattr(found, name).codes.equal(getattr(wanted, name).codes)


def test_a_wide_neighbour_does_not_change_a_narrow_expert() -> None:
    experts, inputs = make([6, 120])
    both = quantize(experts, [2] * 126, inputs)
    alone = quantize(
        RaggedTier(experts.gate[:6], experts.up[:6], experts.down[:6], (0, 6)),
        [2] * 6,
        only(inputs, 0),
    )
    assert (both.down.codes[:6] != alone.down.codes).float().mean() < 0.005


def test_hessians_are_the_same_summed_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = make([16, 16])
    whole = quantize(experts, [3] * 32, inputs)
    monkeypatch.setattr(cost, "TOKENS_AT_ONCE", 7)
    parts = quantize(experts, [3] * 32, inputs)
    assert (whole.down.codes != parts.down.codes).float().mean() < 0.01


def weighted_error(
    experts: RaggedTier[torch.Tensor], parts: list[QuantizedExpert], inputs: RoutedInputs
) -> float:
    """‖Σ a (ŷ - y)‖² over the tokens of every expert, a being their routing weights."""
    error = 0.0
    for part in parts:
        rows, x = experts.rows(part.expert), inputs.x[inputs.tokens[part.expert]]
        both = []
        for gate, up, down in (
            (experts.gate[rows], experts.up[rows], experts.down[rows]),
            [part.rows[p].dequantize() for p in PROJECTIONS],
        ):
            both.append((functional.silu(x @ gate.T) * (x @ up.T)) @ down)
        off = (both[1] - both[0]) * inputs.weights[part.expert][:, None]
        error += off.square().sum().item()
    return error


def _parts(
    experts: RaggedTier[torch.Tensor], inputs: RoutedInputs, bits: int, **switches: bool
) -> list[QuantizedExpert]:
    row_bits = torch.full((experts.offsets[-1],), bits)
    return list(
        quantize_experts(
            experts, row_bits, inputs, group_size=32, solver="gptq", device=CPU, **switches
        )
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_down_makes_up_for_what_gate_and_up_have_lost(bits: int) -> None:
    experts, inputs = make([32, 32, 32], num_tokens=2000)
    plain = _parts(experts, inputs, bits, weighted=True)
    fitted = _parts(experts, inputs, bits, weighted=True, refit=True)
    for before, after in zip(plain, fitted, strict=True):
        for projection in ("gate", "up"):
            assert before.rows[projection].codes.equal(after.rows[projection].codes)
    errors = [weighted_error(experts, parts, inputs) for parts in (fitted, plain)]
    assert errors[0] < 0.98 * errors[1]


def test_tokens_count_by_their_routing_weight() -> None:
    experts, inputs = make([32, 32], num_tokens=1000)
    heavy = tuple(w**6 for w in inputs.weights)
    inputs = RoutedInputs(inputs.x, inputs.tokens, heavy)
    errors = [
        weighted_error(experts, _parts(experts, inputs, 2, weighted=weighted), inputs)
        for weighted in (True, False)
    ]
    assert errors[0] < errors[1]


def test_a_fit_that_held_back_tokens_do_not_bear_out_is_not_taken() -> None:
    experts, inputs = make([32], num_tokens=800)
    # The tokens to fit to are all alike and say nothing of the others.
    x = inputs.x.clone()
    x[:700] = x[0] + 1e-3 * x[:700]
    inputs = RoutedInputs(x, inputs.tokens, inputs.weights)
    plain = _parts(experts, inputs, 2, weighted=True)
    fitted = _parts(experts, inputs, 2, weighted=True, refit=True)
    _, held = inputs.split()
    assert weighted_error(experts, fitted, held) <= 1.05 * weighted_error(experts, plain, held)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_polished_experts_are_closer_on_the_layer_output(bits: int, refit: bool) -> None:
    experts, inputs = make([32, 32, 32], num_tokens=3000)
    plain = _parts(experts, inputs, bits, weighted=True, refit=refit)
    polished = _parts(experts, inputs, bits, weighted=True, refit=refit, polish=True)
    errors = [weighted_error(experts, parts, inputs) for parts in (polished, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_a_polish_that_held_back_tokens_do_not_bear_out_is_not_taken_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, inputs = make([32, 32], num_tokens=1600)
    # Of expert 0 neighbours are alike where it is fitted, so that what one loses the other makes up
    # for, and opposite where it is judged.
    x = inputs.x.clone()
    sign = torch.where(inputs.tokens[0] < 1400, 1.0, -1.0)[:, None]
    x[inputs.tokens[0], 1::2] = sign * x[inputs.tokens[0], ::2]
    inputs = RoutedInputs(x, inputs.tokens, inputs.weights)
    polished = _parts(experts, inputs, 2, weighted=True, polish=True)
    assert [part.unpolished for part in polished] == [True, False]
    # No judge prefers what is infinitely wrong.
    monkeypatch.setattr(HeldBack, "error", lambda *_: torch.nan)
    unpolished = _parts(experts, inputs, 2, weighted=True, polish=True)
    assert [part.unpolished for part in unpolished] == [True, True]
    for projection in PROJECTIONS:
        ours, theirs = (parts[1].rows[projection].codes for parts in (polished, unpolished))
        assert not ours.equal(theirs)
    gates = [parts[0].rows["gate"].codes for parts in (polished, unpolished)]
    assert gates[0].equal(gates[1])


def test_what_is_rounded_or_can_not_be_judged_is_not_polished() -> None:
    experts, inputs = make([16, 16, 16], num_tokens=1200)
    early = inputs.tokens[1] < 1000
    few = RoutedInputs(
        inputs.x,
        (inputs.tokens[0][:5], inputs.tokens[1][early], inputs.tokens[2]),
        (inputs.weights[0][:5], inputs.weights[1][early], inputs.weights[2]),
    )
    plain, polished = (_parts(experts, few, 2, polish=polish) for polish in (False, True))
    assert [part.rounded for part in polished] == [True, False, False]
    assert not any(part.unpolished for part in polished[:2])
    alike = [
        all(a.rows[p].codes.equal(b.rows[p].codes) for p in PROJECTIONS)
        for a, b in zip(plain, polished, strict=True)
    ]
    assert alike == [True, True, False]


def test_chunks_and_batches_do_not_change_a_polish(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = make([6, 0, 30, 16])
    whole = together(_parts(experts, inputs, 2, polish=True))
    monkeypatch.setattr(cost, "SOLVER_BYTES", 1)
    monkeypatch.setattr(cost, "TOKENS_AT_ONCE", 7)
    parts = together(_parts(experts, inputs, 2, polish=True))
    for name in PROJECTIONS:
        assert (getattr(whole, name).codes != getattr(parts, name).codes).float().mean() < 0.01


def test_routing_weights_count_the_more_the_more_tokens_there_are() -> None:
    spreads = []
    for tokens in (0, 1, 64, 512, 10**5):
        weights = torch.rand(tokens, generator=torch.Generator().manual_seed(0)) + 0.01
        inputs = RoutedInputs(torch.empty(tokens, 16), (torch.arange(tokens),), (weights,))
        (tempered,) = _tempered(inputs).weights
        assert len(tempered) == tokens and tempered.isfinite().all()
        if tokens > 1:
            torch.testing.assert_close(tempered.square().sum(), weights.square().sum())
            spreads.append(float(tempered.square().std() / weights.square().std()))
    assert spreads == pytest.approx([1 / 3, 0.8, 1], rel=0.01)


def test_on_few_tokens_uneven_weights_cost_less_than_they_would() -> None:
    """What GPTQ leaves on tokens that it was not given, weighted as far as there are tokens."""
    errors = {"tempered": 0.0, "full": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        experts, _ = make([32])
        x = torch.randn(2064, D_MODEL) * torch.linspace(0.2, 2, D_MODEL)
        weights = torch.rand(len(x)) ** 4
        seen = RoutedInputs(x[:64], (torch.arange(64),), (weights[:64],))
        held = RoutedInputs(x, (torch.arange(64, len(x)),), (weights[64:],))
        for name, given in (("tempered", experts_module._tempered), ("full", lambda own: own)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(experts_module, "_tempered", given)
                parts = _parts(experts, seen, 3, weighted=True)
            errors[name] += weighted_error(experts, parts, held)
    assert errors["tempered"] < 0.9 * errors["full"]
