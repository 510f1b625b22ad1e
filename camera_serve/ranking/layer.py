"""Running the calibration tokens through one loaded MoE layer: its energies, and its inputs."""

import logging

import torch

from camera_serve.calibration.attention import without_attention
from camera_serve.calibration.inputs import InputRecorder
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.errors import CalibrationError
from camera_serve.ranking.energy import (
    CoefficientSums,
    MeasuredExperts,
    MeasuredSharedExpert,
    RoutedExpertsMeter,
    SharedExpertMeter,
)
from camera_serve.ranking.selection import LayerEnergies

logger = logging.getLogger(__name__)


@torch.inference_mode()
def measure(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    alpha: float,
    recorder: InputRecorder | None = None,
) -> LayerEnergies:
    """Run the calibration tokens through one MoE layer up to its experts; their energies.

    hidden: `[samples, seq_len, d_model]`, the layer's input. `recorder` keeps what the routed
    experts were given. `loaded` run on `hidden` gives the layer's output afterwards as before, with
    whatever experts it is then given: where its form allows, what its attention adds lies in
    `hidden` by then, and is left out of `loaded`.
    """
    assert loaded.experts is not None
    routed, shared = RoutedExpertsMeter(loaded.experts, stream.device), None
    if recorder:
        routed.register_forward_pre_hook(recorder)
    if loaded.shared is not None:
        shared = SharedExpertMeter(loaded.shared, loaded.shared_gate)
    silent = without_attention(stream, layer, loaded, hidden)
    with loaded.experts_replaced(routed, shared):
        if silent:
            stream.run(layer, loaded, hidden)
        else:
            logger.info("layer %d: its form has the attention run twice", layer)
            for _ in stream.outputs(layer, loaded, hidden):
                pass
    for name, module in silent.items():
        setattr(loaded.module, name, module)
    sums = shared.sums if shared else None
    return _energies(stream, layer, loaded, routed.sums, sums, alpha)


@torch.inference_mode()
def run_measured(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor, alpha: float
) -> LayerEnergies:
    """Run the calibration tokens through one MoE layer as it is; the energies of its experts.

    hidden: `[samples, seq_len, d_model]`, the layer's input, which its output takes the place of.
    """
    assert loaded.experts is not None
    routed, shared = MeasuredExperts(loaded.experts, stream.device), None
    if loaded.shared is not None:
        shared = MeasuredSharedExpert(loaded.shared, loaded.shared_gate)
    with loaded.experts_replaced(routed, shared):
        stream.run(layer, loaded, hidden)
    sums = shared.meter.sums if shared else None
    return _energies(stream, layer, loaded, routed.meter.sums, sums, alpha)


def _energies(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    routed: CoefficientSums,
    shared: CoefficientSums | None,
    alpha: float,
) -> LayerEnergies:
    assert loaded.experts is not None
    experts = routed.energies(loaded.experts.down, alpha).cpu()
    shared_energies = torch.empty(0, dtype=torch.float64)
    if shared is not None:
        shared_energies = shared.energies(loaded.shared.down_proj.weight.T, alpha).cpu()
    _require_finite(torch.cat([experts, shared_energies]), stream, layer)
    return LayerEnergies(
        experts.view(stream.structure.num_experts, -1), shared_energies, routed.tokens.cpu()
    )


def _require_finite(energies: torch.Tensor, stream: ModelStream, layer: int) -> None:
    bad = int((~energies.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"{stream.structure.moe_prefix(layer)}: {bad} of {len(energies)} energies are NaN or "
            f"Inf when computed in {stream.dtype}: use --dtype bfloat16 or float32"
        )
