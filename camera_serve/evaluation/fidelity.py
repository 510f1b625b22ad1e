"""How far a compressed model's MoE layers are from the original's, on calibration text."""

import copy

import torch
from torch import nn

from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.hf.experts import put_experts
from camera_serve.progress import OnProgress, Reporter
from camera_serve.recipe import Calibration


class _Comparison(nn.Module):
    """Runs two MoE layers on the same tokens, returns the first's output, sums the difference."""

    def __init__(self, original: nn.Module, compressed: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.compressed = compressed
        self.error = self.energy = 0.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wanted = self.original(hidden_states)
        difference = self.compressed(hidden_states).double() - wanted.double()
        self.error += difference.square().sum().item()
        self.energy += wanted.double().square().sum().item()
        return wanted


def output_errors(
    original: Checkpoint,
    compressed: Checkpoint,
    calibration: Calibration,
    *,
    device: torch.device,
    on_progress: OnProgress | None = None,
) -> dict[int, float]:
    """Relative error of each MoE layer's output, `‖ŷ - y‖ / ‖y‖`, on the original's activations.

    Each layer is judged alone: it gets what the original's layers before it make, so that errors
    do not add up (paper, section 6.2).
    """
    tokens = windows_for(original, calibration).tokens
    stream = ModelStream(original, device, original.dtype)
    report = Reporter(stream.structure.num_layers, device, on_progress)
    hidden = stream.embed(tokens)
    errors: dict[int, float] = {}
    report("compare outputs", 0)
    with stream.loading(range(stream.structure.num_layers)) as load:
        for layer in range(stream.structure.num_layers):
            error, hidden = _layer_error(stream, compressed, layer, load(), hidden)
            if error is not None:
                errors[layer] = error
            report("compare outputs", layer + 1)
    return errors


def _layer_error(
    stream: ModelStream,
    compressed: Checkpoint,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
) -> tuple[float | None, torch.Tensor]:
    """The error of a layer's MoE, None where it is dense, and the original layer's output."""
    if loaded.experts is None:
        return None, stream.run(layer, loaded, hidden)
    loaded.use_experts(loaded.experts)
    comparison = _compare(loaded.moe, compressed, layer)
    setattr(loaded.module, loaded.moe_name, comparison)
    hidden = stream.run(layer, loaded, hidden)
    return (comparison.error / max(comparison.energy, 1e-300)) ** 0.5, hidden


def _compare(moe: nn.Module, compressed: Checkpoint, layer: int) -> _Comparison:
    other = copy.copy(moe)
    other._modules = dict(moe._modules)
    put_experts(other, compressed, layer, compressed.dtype)
    return _Comparison(moe, other)
