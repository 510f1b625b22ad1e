"""Other ways to spend 2 bits: the baselines that CAMERA-Q's own choices are measured against.

They share its solver and differ in one thing each. Every method takes 16-bit experts of one width
and the tokens routed to them, and returns the experts as they would be served.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from camera_serve.calibration.inputs import InputRecorder, RoutedInputs, every_token
from camera_serve.calibration.streaming import ModelStream
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.compression.layer import set_shared
from camera_serve.compression.quantize.gptq import solve_along_columns, solve_along_rows
from camera_serve.evaluation.perplexity import load_model
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.layer import measure
from camera_serve.recipe import Calibration

GROUP = 128
CPU = torch.device("cpu")

Tier = RaggedTier[torch.Tensor]
Method = Callable[[Tier, RoutedInputs], Tier]


def sliced_by_input(ratio: float) -> Method:
    """CAMERA-Q† (section 5.2): the same bits, given to input columns of each matrix by diag(H).

    A micro-expert's gate and up rows then hold all three precisions (appendix A.6).
    """

    def quantize(experts: Tier, inputs: RoutedInputs) -> Tier:
        gate_up, down = _stacked(experts)
        hessians = _hessians(inputs, range(len(gate_up)))
        gate_up = _by_column(gate_up, hessians, ratio)
        down = _by_column(down, _activation_hessians(gate_up, inputs), ratio)
        return _flattened(gate_up, down, experts.offsets)

    return quantize


def down_along_micro_experts(experts: Tier, inputs: RoutedInputs) -> Tier:
    """2 bits throughout, down_proj in groups of consecutive micro-experts per output."""
    gate_up, down = _stacked(experts)
    hessians = _hessians(inputs, range(len(gate_up)))
    levels = gate_up.new_full(gate_up.shape[:2], 3)
    gate_up = solve_along_columns(gate_up, hessians, levels, GROUP).dequantized
    hessians = _activation_hessians(gate_up, inputs)
    levels = down.new_full(down.shape[:2], 3)
    down = solve_along_columns(down, hessians, levels, min(GROUP, down.shape[2])).dequantized
    return _flattened(gate_up, down, experts.offsets)


@torch.inference_mode()
def ablated(model: Path, calibration: Calibration, method: Method) -> Any:
    """The model in float32 with every MoE layer quantized by `method`, layer after layer."""
    checkpoint = Checkpoint.open(model)
    stream = ModelStream(checkpoint, CPU, checkpoint.dtype)
    whole = load_model(model)
    hidden = stream.embed(windows_for(checkpoint, calibration).tokens)
    for layer in range(stream.structure.num_layers):
        loaded, recorder = stream.load(layer), InputRecorder()
        assert loaded.experts is not None
        measure(stream, layer, loaded, hidden, 0.95, recorder)
        inputs = recorder.routed(stream.structure.num_experts)
        experts = method(loaded.experts, inputs)
        loaded.use_experts(experts)
        mlp = whole.model.layers[layer].mlp
        gate, up, down = (m.unflatten(0, (-1, stream.structure.d_ff)) for m in _matrices(experts))
        mlp.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        mlp.experts.down_proj.copy_(down.transpose(1, 2))
        shared = loaded.shared
        rows = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T)
        tier = method(RaggedTier(*rows, offsets=(0, len(rows[0]))), every_token(inputs))
        set_shared(shared, tier)
        gate, up, down = (m.float() for m in _matrices(tier))
        set_shared(mlp.shared_expert, RaggedTier(gate, up, down, tier.offsets))
        hidden = stream.run(layer, loaded, hidden)
    return whole


def _matrices(experts: Tier) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return experts.gate, experts.up, experts.down


def _stacked(experts: Tier) -> tuple[torch.Tensor, torch.Tensor]:
    """`[experts, 2 * d_ff, d_model]` and `[experts, d_model, d_ff]`, float32."""
    shape = (len(experts.offsets) - 1, -1)
    gate, up, down = (m.float().unflatten(0, shape) for m in _matrices(experts))
    return torch.cat([gate, up], dim=1), down.transpose(1, 2)


def _flattened(gate_up: torch.Tensor, down: torch.Tensor, offsets: tuple[int, ...]) -> Tier:
    gate, up = (m.flatten(0, 1).bfloat16() for m in gate_up.chunk(2, dim=1))
    return RaggedTier(gate, up, down.transpose(1, 2).flatten(0, 1).bfloat16(), offsets)


def _hessians(inputs: RoutedInputs, experts: range) -> torch.Tensor:
    own = (inputs.x[inputs.tokens[expert]].float() for expert in experts)
    return torch.stack([x.T @ x for x in own])


def _activation_hessians(gate_up: torch.Tensor, inputs: RoutedInputs) -> torch.Tensor:
    hessians = []
    for expert, weights in enumerate(gate_up):
        x, (gate, up) = inputs.x[inputs.tokens[expert]].float(), weights.chunk(2)
        activations = functional.silu(x @ gate.T) * (x @ up.T)
        hessians.append(activations.T @ activations)
    return torch.stack(hessians)


def _by_column(weights: torch.Tensor, hessians: torch.Tensor, ratio: float) -> torch.Tensor:
    """Quantize `[experts, rows, columns]`: 3, 2 and 1 bits to columns by falling diag(H)."""
    columns = weights.shape[2]
    order = hessians.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    high = round(ratio * columns)
    levels = torch.tensor([7.0] * high + [3.0] * (columns - 2 * high) + [1.0] * high)
    by_rank = order[:, None].expand_as(weights)
    both = torch.stack([h[o][:, o] for h, o in zip(hessians, order, strict=True)])
    solved = solve_along_rows(
        weights.gather(2, by_rank), both, levels.expand(len(weights), -1), GROUP
    )
    return torch.empty_like(weights).scatter_(2, by_rank, solved.dequantized)
