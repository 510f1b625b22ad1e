"""A small layer through the MoE method as vLLM calls it, beside the plain-torch reference.

For a vLLM that was never tested: names and signatures may stay while what they mean changes.
"""

from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from camera_serve.checkpoint.format import DENSE_TIERS
from camera_serve.errors import ServingError, first_line
from camera_serve.models import Projection
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import RaggedLayer, RaggedTier, ragged_moe
from camera_serve.vllm_plugin import torch_moe
from camera_serve.vllm_plugin.contract import refusal
from camera_serve.vllm_plugin.loading import split_layer
from camera_serve.vllm_plugin.moe import CameraMoEMethod

COUNTS = ((0,), (1,), (5,))
D_MODEL = 16
NUM_TOKENS = 3
TOLERANCE = 1e-4

_SHARDS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}
Weights = dict[tuple[int, Projection], torch.Tensor]


def try_layer(moe: FusedMoEConfig) -> None:
    """Raise `ServingError` when a small layer cannot be loaded and run, or gives other numbers.

    moe: vLLM's configuration of a layer of the model: the small one is split over the same ranks.
    It runs in plain torch, on the device that torch makes tensors on.
    """
    try:
        found, wanted = _outputs(moe)
    except Exception as error:  # Whatever an unknown vLLM may do on the way.
        problem = f"a small layer fails with {type(error).__name__}: {first_line(error)}"
        raise ServingError(refusal(vllm.__version__, [problem])) from error
    if not torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
        worst = (found - wanted).abs().max().item()
        problem = f"a small layer's output is off by {worst:.2g}, where {TOLERANCE:g} is rounding"
        raise ServingError(refusal(vllm.__version__, [problem]))


def _outputs(moe: FusedMoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What the method makes of a few tokens, and what it should, `[tokens, d_model]` each."""
    weights: Weights = {
        (expert, projection): _wave(width, D_MODEL, phase=3 * expert + number)
        for expert, (width,) in enumerate(COUNTS)
        for number, projection in enumerate(PROJECTIONS)
    }
    x = _wave(NUM_TOKENS, D_MODEL, phase=20)
    ids = torch.tensor([[0, 1], [2, 1], [2, 0]], dtype=torch.int32)
    top_k_weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 0.75]])
    layer = _loaded(moe, weights)
    found = _run(layer, x, top_k_weights, ids)
    return found, ragged_moe(x, top_k_weights, ids, _rank_rows(moe, weights))


def _run(
    layer: Any, x: torch.Tensor, top_k_weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    if layer.quant_method.is_monolithic:
        # vLLM hands over router logits, and it is we who call `apply`.
        return layer.quant_method.apply(layer, x, top_k_weights, ids, None, None)
    return RoutedExperts.forward_modular(
        layer,
        x=x,
        topk_weights=top_k_weights,
        topk_ids=ids,
        shared_experts=None,
        shared_experts_input=None,
    )


def _loaded(moe: FusedMoEConfig, weights: Weights) -> Any:
    """A stand-in for vLLM's layer, its weights loaded by the calls of both kinds of models."""
    method = CameraMoEMethod(
        moe,
        COUNTS,
        DENSE_TIERS,
        "small layer",
        lambda expert, projection: f"{expert}.{projection}",
        pack=lambda holder, rows, like, top_k: torch_moe.pack(holder, rows),
    )
    layer: Any = nn.Module()
    layer.quant_method = method
    layer.moe_config = moe
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.global_num_experts = len(COUNTS)
    layer._map_global_expert_id_to_local_expert_id = int
    method.create_weights(layer, len(COUNTS), D_MODEL, 1, torch.float32)
    for (expert, projection), rows in weights.items():
        if len(rows):
            _load(layer, expert, projection, rows)
    method.process_weights_after_loading(layer)
    return layer


def _load(layer: Any, expert: int, projection: Projection, rows: torch.Tensor) -> None:
    shard = next(shard for shard, name in _SHARDS.items() if name == projection)
    param = layer.w2_weight if shard == "w2" else layer.w13_weight
    tensor = rows.t() if shard == "w2" else rows
    rest = {"shard_id": shard, "expert_id": expert, "return_success": True}
    if expert % 2:
        param.weight_loader(param, tensor, "w", **rest)
    else:
        param.weight_loader(param=param, loaded_weight=tensor, weight_name="w", **rest)


def _rank_rows(moe: FusedMoEConfig, weights: Weights) -> RaggedLayer:
    """The rows of this rank, cut from the weights themselves."""
    split = split_layer(COUNTS, tp_size=moe.tp_size, tp_rank=moe.tp_rank)
    gate, up, down = (
        torch.cat(
            [
                weights[expert, projection][run.source : run.source + run.count]
                for expert, runs in enumerate(split.runs)
                for run in runs or ()
            ]
            or [weights[0, projection]]
        )
        for projection in PROJECTIONS
    )
    return RaggedLayer((RaggedTier(gate, up, down, split.offsets[0]),))


def _wave(rows: int, columns: int, phase: int) -> torch.Tensor:
    """Numbers that no two layers share, without touching the random numbers of the engine."""
    steps = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    return torch.sin(steps + phase)
