"""The reference MoE's tokenizer, shape and the operations that make it fast to train on a CPU."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.reference_moe.corpus import SEPARATOR

VOCABULARY = 2048
ATTENTION_BLOCK = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeConfig:
    """Return the reference shape: 4 layers of 16 experts, top-4, and a gated shared expert."""
    return Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        intermediate_size=512,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.003,
        output_router_logits=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sorted_experts(
    experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run every expert once on its tokens: hidden [T, d], index and weights [T, k] -> [T, d]."""
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=experts.num_experts).tolist()
    inputs = hidden.index_select(0, order // top_k_index.shape[1]).split(counts)
    weights = top_k_weights.to(hidden.dtype).flatten().index_select(0, order).split(counts)
    up_parts, down_parts = experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    outputs = []
    for rows, weight, up_part, down_part in zip(inputs, weights, up_parts, down_parts, strict=True):
        gate, up = functional.linear(rows, up_part).chunk(2, dim=-1)
        middle = experts.act_fn(gate) * up * weight.unsqueeze(-1)
        outputs.append(functional.linear(middle, down_part))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return torch.cat(outputs).index_select(0, back).view(*top_k_index.shape, -1).sum(1)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention without padding: query [B, H, L, d], key and value [B, G, L, d].

    The H / G query heads of a key head are rows of one product, block by block of queries:
    2.5 times as fast as PyTorch's CPU kernel at this head size. Returns [B, L, H, d].
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    folded = (query * scaling).reshape(batch * groups, heads // groups, length, size)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    outputs = []
    for start in range(0, length, ATTENTION_BLOCK):
        stop = min(start + ATTENTION_BLOCK, length)
        rows = folded[:, :, start:stop].flatten(1, 2)
        future = torch.ones(stop - start, stop).triu(start + 1).bool()
        bias = torch.zeros(stop - start, stop, dtype=rows.dtype).masked_fill(future, -torch.inf)
        scores = rows @ keys[:, :stop].mT + bias.repeat(heads // groups, 1)
        block = scores.softmax(-1).to(rows.dtype) @ values[:, :stop]
        outputs.append(block.view(batch, heads, stop - start, size))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Initialise the model in bf16 with the fast training implementations."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    ALL_ATTENTION_FUNCTIONS.register("blocked", blocked_attention)
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM._from_config(
        model_config(tokenizer),
        dtype=torch.bfloat16,
        experts_implementation="sorted",
        attn_implementation="blocked",
    )
