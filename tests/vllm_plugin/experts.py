"""A layer's experts as a checkpoint has them, loaded into a method as vLLM loads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from camera_serve.checkpoint.format import DENSE_TIERS, CameraQuantizationConfig, Tiers
from camera_serve.models import describe
from camera_serve.ragged.packing import pack
from camera_serve.vllm_plugin.config import CameraConfig
from camera_serve.vllm_plugin.moe import CameraMoEMethod
from tests import pruning, tiny_models

SHARDS = {"w1": "gate", "w3": "up", "w2": "down"}
Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """Random experts.

    counts: micro-experts by expert and tier. tensors: what a checkpoint has, by expert, shard and
    part. rows: the weights they stand for in float64, `[num_rows, d_model]`, by expert and shard.
    """

    counts: tuple[tuple[int, ...], ...]
    tiers: Tiers
    d_model: int
    tensors: dict[tuple[int, str, str], torch.Tensor]
    rows: dict[tuple[int, str], torch.Tensor]

    @property
    def num_rows(self) -> int:
        return sum(map(sum, self.counts))

    def load(self, layer: Any) -> None:
        """Call the loaders as vLLM's two families of models do."""
        for (expert, shard, part), tensor in self.tensors.items():
            attribute = f"w2_{part}" if shard == "w2" else f"w13_{part}"
            param = getattr(layer, attribute)
            full_name = f"layers.0.mlp.experts.{attribute}"
            rest = {"shard_id": shard, "expert_id": expert, "return_success": True}
            if expert % 2:
                param.weight_loader(param, tensor, full_name, **rest)
            else:
                param.weight_loader(
                    param=param, loaded_weight=tensor, weight_name=full_name, **rest
                )

    def output(
        self, x: torch.Tensor, top_k_weights: torch.Tensor, ids: torch.Tensor, held: range
    ) -> torch.Tensor:
        """Every routed (token, expert) pair on its own, in float64."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token in range(len(x)):
            for slot, expert in enumerate(ids[token].tolist()):
                if expert in held:
                    gate, up, down = (self.rows[expert, shard] for shard in SHARDS)
                    row = x[token].double()
                    hidden = functional.silu(gate @ row) * (up @ row)
                    out[token] += top_k_weights[token, slot] * (hidden @ down)
        return out


def random_experts(
    counts: Sequence[Sequence[int]],
    tiers: Tiers = DENSE_TIERS,
    d_model: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Experts:
    """Weights that keep the size of what goes through, exact in `dtype`."""
    tensors, rows = {}, {}
    for expert, by_tier in enumerate(counts):
        for shard in SHARDS:
            made = [
                _tier_rows(count, bits, tiers.group_size, d_model, dtype)
                for count, bits in zip(by_tier, tiers.bits, strict=True)
            ]
            rows[expert, shard] = torch.cat([weights for weights, _ in made])
            for part in ("weight", "qweight", "scales", "zeros"):
                found = [parts[part] for _, parts in made if part in parts]
                whole = torch.cat(found) if found else torch.empty(0)
                if whole.numel():
                    transposed = part == "weight" and shard == "w2"
                    tensors[expert, shard, part] = whole.T if transposed else whole
    return Experts(tuple(map(tuple, counts)), tiers, d_model, tensors, rows)


def _tier_rows(
    count: int, bits: int, group: int, d_model: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    std = d_model**-0.5
    if bits == 16:
        weights = (torch.randn(count, d_model) * std).to(dtype)
        return weights.double(), {"weight": weights}
    codes = torch.randint(0, 2**bits, (count, d_model))
    scales = ((torch.rand(count, d_model // group) + 0.5) * 3 * std / 2**bits).half()
    zeros = (-scales.float() * (2**bits - 1) / 2).half()
    groups = codes.double().unflatten(1, (-1, group))
    weights = groups * scales.double()[..., None] + zeros.double()[..., None]
    parts = {"qweight": pack(codes, bits).flatten(), "scales": scales, "zeros": zeros}
    return weights.flatten(1), parts


def moe_config(tp_size: int = 1, tp_rank: int = 0, *, has_bias: bool = False) -> Any:
    """What of vLLM's configuration of a layer is asked for."""
    return SimpleNamespace(tp_size=tp_size, tp_rank=tp_rank, has_bias=has_bias, experts_per_token=2)


def camera_config() -> CameraConfig:
    """The method of a model whose one layer, the first, has one expert."""
    layers = {"model.layers.0.mlp": {"experts": [[1]]}}
    config = CameraConfig(
        CameraQuantizationConfig(bits=(16,), layers=layers, recipe=pruning.RECIPE)  # type: ignore[arg-type]
    )
    config._structure = describe(tiny_models.build("qwen2_moe").config)
    return config


def make_layer(
    experts: Experts,
    config: Any = None,
    held: range | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[CameraMoEMethod, Any]:
    """A method and the layer it created weights for; `held`: the experts of this rank."""
    held = range(len(experts.counts)) if held is None else held
    config = config or moe_config()
    method = CameraMoEMethod(config, experts.counts, experts.tiers, "layers.0.mlp", name)
    layer: Any = nn.Module()
    layer.quant_method = method
    layer.moe_config = config
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.global_num_experts = len(experts.counts)
    layer._map_global_expert_id_to_local_expert_id = lambda expert: (
        expert - held.start if expert in held else -1
    )
    for key, value in settings.items():
        setattr(layer, key, value)
    method.create_weights(
        layer,
        num_experts=len(held),
        hidden_size=experts.d_model,
        intermediate_size_per_partition=8,
        params_dtype=dtype,
        weight_loader=None,
        global_num_experts=len(experts.counts),
    )
    return method, layer


def loaded_layer(
    experts: Experts,
    config: Any = None,
    held: range | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[CameraMoEMethod, Any]:
    """`make_layer`, with the experts in it and ready for tokens."""
    method, layer = make_layer(experts, config, held, dtype, **settings)
    experts.load(layer)
    method.process_weights_after_loading(layer)
    return method, layer


def name(expert: int, projection: str) -> str:
    """The checkpoint name of a projection."""
    return f"layers.0.mlp.experts.{expert}.{projection}_proj"


def routed(num_tokens: int, experts: Experts, top_k: int, dtype: torch.dtype) -> Routing:
    """Random tokens, the weights and the ids of their experts."""
    x = torch.randn(num_tokens, experts.d_model).to(dtype)
    drawn = [torch.randperm(len(experts.counts))[:top_k] for _ in range(num_tokens)]
    return x, torch.rand(num_tokens, top_k), torch.stack(drawn).int()
