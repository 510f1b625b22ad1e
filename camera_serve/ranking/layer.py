"""Running the calibration tokens through one loaded MoE layer: its energies, and its inputs."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from camera_serve.calibration.attention import AddsNothing, without_attention
from camera_serve.calibration.inputs import InputRecorder, RoutedInputs
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.errors import CalibrationError, UnsupportedModelError
from camera_serve.ranking.energy import (
    CoefficientSums,
    MeasuredExperts,
    MeasuredSharedExpert,
    RoutedExpertsMeter,
    SharedExpertMeter,
)
from camera_serve.ranking.selection import LayerEnergies

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What `run_measured` finds in a layer.

    energies: by α; scale: what the block multiplies its routed experts' output by; grams: Σφφᵀ of
    each of the routed experts, then of the shared one, `[num_experts, d_ff, d_ff]`; None where not
    wanted.
    """

    energies: Callable[[float], LayerEnergies]
    scale: float
    grams: tuple[torch.Tensor | None, ...]


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
    _run_up_to_experts(stream, layer, loaded, hidden, routed, shared)
    sums = [routed.sums, shared.sums] if shared else [routed.sums]
    scale = scale_of_routed(loaded, stream.structure.moe_prefix(layer))
    return _energies(stream, layer, loaded, sums, scale, alpha)


@torch.inference_mode()
def record(
    stream: ModelStream, layer: int, loaded: StreamedLayer, hidden: torch.Tensor
) -> RoutedInputs:
    """As `measure`, but only what the experts were given."""
    recorder, routed = InputRecorder(), AddsNothing()
    routed.register_forward_pre_hook(recorder)
    _run_up_to_experts(stream, layer, loaded, hidden, routed, AddsNothing())
    return recorder.routed(stream.structure.num_experts)


def _run_up_to_experts(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    routed: nn.Module,
    shared: nn.Module | None,
) -> None:
    """Run a layer with experts that add nothing, and go on from there where its form allows."""
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


@torch.inference_mode()
def run_measured(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    widest_gram: int = 0,
    recorder: InputRecorder | None = None,
) -> Measured:
    """Run the calibration tokens through one MoE layer as it is; the energies of its experts.

    hidden: `[samples, seq_len, d_model]`, the layer's input, which its output takes the place of.
    Experts of up to `widest_gram` micro-experts have their Gram matrices summed too. `recorder`
    keeps what the routed experts were given.
    """
    assert loaded.experts is not None
    routed, shared = MeasuredExperts(loaded.experts, stream.device), None
    if recorder:
        routed.register_forward_pre_hook(recorder)
    meters: list[RoutedExpertsMeter | SharedExpertMeter] = [routed.meter]
    if loaded.shared is not None:
        shared = MeasuredSharedExpert(loaded.shared, loaded.shared_gate)
        meters.append(shared.meter)
    for meter in meters:
        if meter.sums.width <= widest_gram:
            meter.sums = meter.sums.with_grams()
    with loaded.experts_replaced(routed, shared):
        stream.run(layer, loaded, hidden)
    scale = scale_of_routed(loaded, stream.structure.moe_prefix(layer))
    sums = [meter.sums for meter in meters]
    energies = partial(_energies, stream, layer, loaded, sums, scale)
    return Measured(energies, scale, tuple(own.grams for own in sums))


def _energies(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    sums: list[CoefficientSums],
    scale: float,
    alpha: float,
) -> LayerEnergies:
    """Of the sums of the routed experts, then of the shared one, if there is one."""
    assert loaded.experts is not None
    routed, *shared = sums
    experts = scale**2 * routed.energies(loaded.experts.down, alpha).cpu()
    shared_energies = torch.empty(0, dtype=torch.float64)
    if shared:
        shared_energies = shared[0].energies(loaded.shared.down_proj.weight.T, alpha).cpu()
    _require_finite(torch.cat([experts, shared_energies]), stream, layer)
    return LayerEnergies(
        experts.view(stream.structure.num_experts, -1), shared_energies, routed.tokens.cpu()
    )


class _Ones(nn.Module):
    """Stands in for the routed experts, and adds 1."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """`[num_tokens, d_model]` -> the same shape."""
        return torch.ones_like(hidden_states)


@torch.inference_mode()
def scale_of_routed(loaded: StreamedLayer, moe_prefix: str) -> float:
    """What a MoE block multiplies its routed experts' output by: a part of each coefficient.

    Most have it in the routing weights, and give 1 here. In float32, as a number of config.json is
    not one of bfloat16. Raises `UnsupportedModelError` where the
    block does more than scale.
    """
    assert loaded.experts is not None
    token = loaded.experts.gate.new_ones(1, 1, loaded.experts.gate.shape[1]).float()
    with loaded.experts_replaced(_Ones(), AddsNothing()):
        output = copy.deepcopy(loaded.moe).float()(token)
    scales = (output[0] if isinstance(output, tuple) else output).unique()
    if len(scales) != 1:
        raise UnsupportedModelError(
            f"{moe_prefix}: transformers does more with the sum of the routed experts than scale "
            "it: not supported"
        )
    return float(scales)


def _require_finite(energies: torch.Tensor, stream: ModelStream, layer: int) -> None:
    bad = int((~energies.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"{stream.structure.moe_prefix(layer)}: {bad} of {len(energies)} energies are NaN or "
            f"Inf when computed in {stream.dtype}: use --dtype bfloat16 or float32"
        )
