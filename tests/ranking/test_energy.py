"""Energies against Eq. 11 evaluated directly in float64, on the original transformers model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from camera_serve import AnalysisSettings, Calibration, analyze
from camera_serve.calibration.text import calibration_windows
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.energy import CoefficientSums, RoutedExpertsMeter, coefficients
from tests import tiny_models

TEXT = Path(__file__).read_text() * 8


def direct_energies(model: Any, tokens: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """Eq. 4 and 11 from the definition: every φ of every token and micro-expert, no sums reused."""
    captured: dict[str, Any] = {}
    blocks = {n: m for n, m in model.named_modules() if hasattr(m, "experts")}
    for name, block in blocks.items():
        block.experts.register_forward_pre_hook(
            lambda _, args, name=name: captured.__setitem__(name, args)
        )
    model(tokens)
    energies = {}
    for name, block in blocks.items():
        x, ids, weights = captured[name]
        # Laguna applies it to the sum of the experts, the others to the routing weights.
        weights = weights * getattr(block, "routed_scaling_factor", 1.0)
        gates = torch.zeros(len(x), block.experts.num_experts, dtype=torch.float64)
        gates.scatter_(1, ids, weights.double())
        per_expert = []
        for expert, fused in enumerate(block.experts.gate_up_proj):
            gate, up = fused.chunk(2)
            phi = gates[:, expert, None] * nn.functional.silu(x @ gate.T) * (x @ up.T)
            per_expert.append(eq_11(phi, block.experts.down_proj[expert], alpha))
        energies[f"{name}.experts"] = torch.stack(per_expert)
        shared = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
        if shared is not None:
            phi = nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x)
            if hasattr(block, "shared_expert_gate"):
                phi = phi * torch.sigmoid(block.shared_expert_gate(x))
            energies[f"{name}.shared"] = eq_11(phi, shared.down_proj.weight, alpha)
    return energies


def eq_11(phi: torch.Tensor, down: torch.Tensor, alpha: float) -> torch.Tensor:
    return ((1 - alpha) * (phi**2).sum(0) + alpha * phi.abs().amax(0) ** 2) * (down**2).sum(0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@torch.no_grad()
def test_energies_equal_a_direct_float64_evaluation(family: str, tmp_path: Path) -> None:
    path = tiny_models.save(family, tmp_path / "model", dtype=torch.float32)
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = Calibration(source=str(tmp_path / "text.txt"), samples=3, seq_len=64)
    analyze(path, tmp_path / "out", AnalysisSettings(calibration=calibration, alpha=0.95))
    found = load_file(tmp_path / "out" / "energies.safetensors")

    model = tiny_models.load(path, dtype=torch.float64, experts_implementation="eager")
    wanted = direct_energies(model, calibration_windows(calibration, path).tokens, alpha=0.95)
    structure = Checkpoint.open(path).structure
    assert {structure.to_checkpoint_name(f"{n}.")[:-1] for n in wanted} <= found.keys()
    for name, energies in wanted.items():
        # float32 activations against float64: a few hundred roundings of 6e-8 on the way here.
        ours = found[structure.to_checkpoint_name(f"{name}.")[:-1]]
        torch.testing.assert_close(ours, energies, rtol=2e-4, atol=1e-12 + 1e-6 * energies.max())


@torch.no_grad()
def test_renormalised_routing_weights_change_the_energies_as_the_model_applies_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = Calibration(source=str(tmp_path / "text.txt"), samples=2, seq_len=32)
    first_layer = []
    for norm in (False, True):
        path = tiny_models.save(
            "qwen2_moe", tmp_path / f"{norm}", dtype=torch.float32, norm_topk_prob=norm
        )
        analyze(path, tmp_path / f"out-{norm}", AnalysisSettings(calibration=calibration))
        found = load_file(tmp_path / f"out-{norm}" / "energies.safetensors")
        first_layer.append(found["model.layers.0.mlp.experts"].sum())
    assert first_layer[1] > 1.05 * first_layer[0]


def test_alpha_moves_from_the_sum_to_the_maximum() -> None:
    sums = CoefficientSums.zeros(2, 1, torch.device("cpu"))
    sums.add(0, slice(0, 2), torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
    sums.add(0, slice(0, 2), torch.tensor([[2.0, -1.0]]))
    down = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert sums.energies(down, 0.0).tolist() == [9.0, 40.0]
    assert sums.energies(down, 1.0).tolist() == [4.0, 36.0]
    assert sums.energies(down, 0.5).tolist() == [6.5, 38.0]
    assert sums.tokens.tolist() == [3]


def test_coefficients_carry_the_routing_weight() -> None:
    gate, up = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    phi = coefficients(gate, up, torch.tensor([0.5, 0.25]))
    silu = [1 / (1 + 2.718281828459045**-1), 2 / (1 + 2.718281828459045**-2)]
    torch.testing.assert_close(phi, torch.tensor([[silu[0] * 1.5], [silu[1] * 1.0]]))


def test_an_expert_never_routed_has_energy_0_and_no_nan() -> None:
    experts = RaggedTier(*(torch.randn(6, 4) for _ in range(3)), offsets=(0, 2, 4, 6))
    meter = RoutedExpertsMeter(experts, torch.device("cpu"))
    out = meter(torch.randn(5, 4), torch.tensor([[0], [0], [2], [2], [0]]), torch.ones(5, 1))
    energies = meter.sums.energies(experts.down, 0.95)
    assert meter.sums.tokens.tolist() == [3, 0, 2]
    assert energies[2:4].tolist() == [0.0, 0.0]
    assert (energies[[0, 1, 4, 5]] > 0).all()
    assert out.equal(torch.zeros(5, 4))
