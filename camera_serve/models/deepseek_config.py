"""The settings of DeepSeek-MoE (v1), without its model, which brings Llama and Qwen2-MoE along.

Every process that vLLM starts registers them, whatever it serves.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class DeepseekConfig(LlamaConfig):
    """The settings of a DeepSeek-MoE-16B `config.json`, under their own names."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001


def register_deepseek_config() -> None:
    """Teach transformers' `AutoConfig` the model type `deepseek`; repeatable."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
