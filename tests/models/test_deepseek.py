import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from camera_serve.errors import UnsupportedModelError
from camera_serve.models import describe
from camera_serve.models.deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekMoe,
    register_deepseek,
)
from tests import tiny_models

# The settings of the published DeepSeek-MoE-16B config.json that decide shapes and routing.
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}


def _mlp(x, gate, up, down):
    pre = x @ gate.T
    return (pre / (1 + torch.exp(-pre)) * (x @ up.T)) @ down.T


def moe_by_formula(moe: DeepseekMoe, x: torch.Tensor, top_k: int, renormalise: bool):
    """Eq. 9-11 of DeepSeekMoE in float64, one token and one expert at a time."""
    weights = {name: tensor.double() for name, tensor in moe.state_dict().items()}
    d_ff = weights["experts.down_proj"].shape[-1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        affinity = torch.exp(weights["gate.weight"] @ token)
        affinity = affinity / affinity.sum()
        chosen = sorted(range(len(affinity)), key=lambda e: -affinity[e])[:top_k]
        total = sum(affinity[e] for e in chosen) if renormalise else 1
        for e in chosen:
            gate_up = weights["experts.gate_up_proj"][e]
            y = _mlp(token, gate_up[:d_ff], gate_up[d_ff:], weights["experts.down_proj"][e])
            out[t] += affinity[e] / total * y
        if moe.shared_experts is not None:
            shared = [weights[f"shared_experts.{p}_proj.weight"] for p in ("gate", "up", "down")]
            out[t] += _mlp(token, *shared)
    return out


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("n_shared_experts", [0, 1, 2])
def test_moe_layer_equals_the_published_formulas(renormalise, n_shared_experts):
    model = tiny_models.build(
        "deepseek", norm_topk_prob=renormalise, n_shared_experts=n_shared_experts
    )
    moe = model.model.layers[1].mlp
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = moe(x)
    expected = moe_by_formula(moe, x.flatten(0, 1), top_k=3, renormalise=renormalise)
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-4)


def test_only_layers_from_first_k_dense_replace_hold_experts():
    model = tiny_models.build("deepseek", num_hidden_layers=4, first_k_dense_replace=2)
    kinds = [isinstance(layer.mlp, DeepseekMoe) for layer in model.model.layers]
    assert kinds == [False, False, True, True]


def test_checkpoint_holds_one_tensor_per_expert_and_loads_back_exactly(tmp_path):
    tiny_models.save("deepseek", tmp_path, dtype=torch.float32)
    model = tiny_models.build("deepseek")
    tensors = load_file(tmp_path / "model.safetensors")
    fused = model.state_dict()["model.layers.2.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(
        tensors["model.layers.2.mlp.experts.5.gate_proj.weight"], fused[5, :64], rtol=0, atol=0
    )
    torch.testing.assert_close(
        tensors["model.layers.2.mlp.experts.5.up_proj.weight"], fused[5, 64:], rtol=0, atol=0
    )
    assert tensors["model.layers.1.mlp.shared_experts.down_proj.weight"].shape == (64, 128)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DeepseekForCausalLM)
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


def test_published_config_is_read_and_sized_as_16_4_billion_parameters(tmp_path):
    register_deepseek()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, DeepseekConfig)
    assert config.rope_parameters == {"rope_theta": 10000, "rope_type": "default"}
    structure = describe(config)
    assert (structure.num_experts, structure.d_ff, structure.shared_d_ff) == (64, 1408, 2816)
    assert structure.moe_layers == tuple(range(1, 28))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128


def test_generation_with_a_cache_equals_recomputing_every_step():
    model = tiny_models.build("deepseek")
    prompt = torch.tensor([[5, 9, 77, 200, 31]])
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens = prompt
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == tokens.tolist()


def test_registration_is_repeatable():
    register_deepseek()
    register_deepseek()
    assert isinstance(AutoConfig.for_model("deepseek"), DeepseekConfig)


def test_unknown_scoring_function_is_refused():
    with pytest.raises(UnsupportedModelError, match="scoring_func = 'sigmoid'"):
        tiny_models.build("deepseek", scoring_func="sigmoid")
