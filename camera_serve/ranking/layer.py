"""Running the calibration tokens through one loaded MoE layer: its energies, and its inputs."""

import torch

from camera_serve.calibration.inputs import InputRecorder
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.errors import CalibrationError
from camera_serve.ranking.energy import RoutedExpertsMeter, SharedExpertMeter
from camera_serve.ranking.selection import LayerEnergies


@torch.inference_mode()
def measure(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    alpha: float,
    recorder: InputRecorder | None = None,
) -> LayerEnergies:
    """Run the calibration tokens through one MoE layer and return its energies (Algorithm 1).

    hidden: `[samples, seq_len, d_model]`, the layer's input. `recorder` keeps what the routed
    experts were given. The layer's experts modules are replaced while it runs; the shared ones
    are put back.
    """
    assert loaded.experts is not None
    routed = RoutedExpertsMeter(loaded.experts, stream.device)
    if recorder:
        routed.register_forward_pre_hook(recorder)
    mlp, name = loaded.module.mlp, stream.structure.family.shared_name or ""
    mlp.experts = routed
    shared = None
    if loaded.shared is not None:
        shared = SharedExpertMeter(loaded.shared, loaded.shared_gate)
        setattr(mlp, name, shared)
    for _ in stream.outputs(layer, loaded, hidden):
        pass
    experts = routed.sums.energies(routed.down, alpha).cpu()
    shared_energies = torch.empty(0, dtype=torch.float64)
    if shared is not None:
        setattr(mlp, name, loaded.shared)
        shared_energies = shared.sums.energies(loaded.shared.down_proj.weight.T, alpha).cpu()
    _require_finite(torch.cat([experts, shared_energies]), stream, layer)
    return LayerEnergies(
        experts.view(stream.structure.num_experts, -1), shared_energies, routed.sums.tokens.cpu()
    )


def _require_finite(energies: torch.Tensor, stream: ModelStream, layer: int) -> None:
    bad = int((~energies.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"{stream.structure.moe_prefix(layer)}: {bad} of {len(energies)} energies are NaN or "
            f"Inf when computed in {stream.dtype}: use --dtype bfloat16 or float32"
        )
