"""Real MoE layer shapes, and layouts as uneven as a real ranking's."""

from collections.abc import Mapping
from typing import Any

import torch

from bench.shapes.energy_spread import EnergySpread
from camera_serve.ragged.layout import LayerLayout
from camera_serve.ranking.selection import LayerEnergies, select
from camera_serve.recipe import Settings, TierPlan

ALIGN = 32


class Shape(Settings):
    """The sizes of a published model's MoE layer, and what `python -m bench.shapes` writes of it.

    `shared_d_ff` is the joint width of the shared experts, 0 without. `config` is the rest of its
    config.json. By default `layers` layers and `vocab` tokens are written: the head then weighs
    against so few layers about what the real one weighs against all of them.
    """

    num_experts: int
    top_k: int
    d_ff: int
    d_model: int
    shared_d_ff: int = 0
    config: Mapping[str, Any]
    layers: int
    vocab: int


SHAPES: dict[str, Shape] = {
    "qwen3-30b-a3b": Shape(
        num_experts=128,
        top_k=8,
        d_ff=768,
        d_model=2048,
        config={
            "model_type": "qwen3_moe",
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 40960,
        },
        layers=4,
        vocab=12288,
    ),
    "deepseek-moe-16b": Shape(
        num_experts=64,
        top_k=6,
        d_ff=1408,
        d_model=2048,
        shared_d_ff=2816,
        config={
            "model_type": "deepseek",
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            # The published first layer is dense: among so few layers it would count too much.
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
        },
        layers=4,
        vocab=14592,
    ),
    "qwen2-57b-a14b": Shape(
        num_experts=64,
        top_k=8,
        d_ff=2560,
        d_model=3584,
        shared_d_ff=20480,
        config={
            "model_type": "qwen2_moe",
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_experts": 64,
            "norm_topk_prob": False,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
        },
        layers=2,
        vocab=10752,
    ),
    "mixtral-8x7b": Shape(
        num_experts=8,
        top_k=2,
        d_ff=14336,
        d_model=4096,
        config={
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
        },
        layers=2,
        # `vllm bench latency` draws token ids below 10,000.
        vocab=10240,
    ),
}


def layer_energies(shape: Shape, seed: int) -> LayerEnergies:
    """Random energies and tokens per expert of one layer, as uneven as the reference MoE's.

    Layer `seed` has the spread of the reference MoE's layer `seed`, counted round.
    """
    layers = EnergySpread.stored().layers
    generator = torch.Generator().manual_seed(seed)
    spread = layers[seed % len(layers)]
    return spread.draw(shape.num_experts, shape.d_ff, shape.shared_d_ff, generator)


def layer_counts(shape: Shape, plan: TierPlan, seed: int, align: int = ALIGN) -> LayerLayout:
    """How many micro-experts of each expert a plan keeps in each tier of layer `seed`."""
    return select(layer_energies(shape, seed), plan, align).layout
