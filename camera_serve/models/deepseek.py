"""DeepSeek-MoE (v1), which transformers has no class for: Llama attention, Qwen2-MoE experts.

The MoE layer is Eq. 9-11 of the DeepSeekMoE paper (arXiv 2401.06066); everything else is Llama.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, initialization
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoeTopKRouter,
)

from camera_serve.errors import UnsupportedModelError
from camera_serve.models.deepseek_config import DeepseekConfig, register_deepseek_config
from camera_serve.models.families import whole


class DeepseekMoe(nn.Module):
    """Routed experts plus the shared experts, which every token passes with weight 1."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        if config.scoring_func != "softmax":
            raise UnsupportedModelError(
                f"deepseek with scoring_func = {config.scoring_func!r} is not understood: wanted "
                "'softmax'"
            )
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            # The checkpoint stores all shared experts as one MLP of their joint width.
            shared_d_ff = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = Qwen2MoeMLP(config, intermediate_size=shared_d_ff)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, d_model]` to the same shape and dtype."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_ids = self.gate(tokens)
        out = self.experts(tokens, top_k_ids, top_k_weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view_as(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose MLP is a `DeepseekMoe` from layer `first_k_dense_replace` on."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        dense = whole(config, "first_k_dense_replace", least=0)
        every = whole(config, "moe_layer_freq")
        if config.n_routed_experts and layer_idx >= dense and layer_idx % every == 0:
            self.mlp = DeepseekMoe(config)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """What transformers must know about the family: its config, layers and initialisation."""

    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers decides by searching this file for a decorator that Qwen2MoeExperts carries.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen2MoeExperts):
            initialization.normal_(module.gate_up_proj, mean=0.0, std=std)
            initialization.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen2MoeTopKRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """LlamaModel over `DeepseekDecoderLayer`s; its forward is inherited."""

    def __init__(self, config: DeepseekConfig) -> None:
        # LlamaModel's own constructor would build and throw away dense layers.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """DeepSeek-MoE (v1) with its language-model head; forward and generation are Llama's."""

    def __init__(self, config: DeepseekConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register_deepseek() -> None:
    """Teach transformers' Auto classes the model type `deepseek`; repeatable.

    Its checkpoints name expert tensors as Qwen2-MoE's do, so they share that conversion.
    """
    register_deepseek_config()
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    conversions: list[Any] = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("deepseek", conversions, overwrite=True)
