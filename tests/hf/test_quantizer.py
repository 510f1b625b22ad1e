import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2MoeForCausalLM,
)

import camera_serve.hf
from camera_serve.errors import CheckpointError
from tests import drafts, pruning, quantized, tiny_models

# Both models sum the same float32 terms in another order; logits have a standard deviation of 4
# and the layers' rounding errors stay below 1e-4 of that.
FLOAT32 = {"rtol": 1e-4, "atol": 4e-4}
PROMPT = torch.tensor([[42, 71, 78, 78, 81, 9, 200, 31, 5, 310, 11, 63]])


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=tiny_models.FORMS)
def form(request):
    return request.param


def compress(tmp_path, family, widths=pruning.hostile, **overrides):
    dense = tiny_models.save(family, tmp_path / "dense", **overrides)
    kept = pruning.prune(dense, tmp_path / "camera", widths)
    return dense, tmp_path / "camera", kept


def logits(model, tokens=PROMPT):
    with torch.no_grad():
        return model(tokens).logits


def test_logits_equal_the_original_with_the_same_micro_experts_zeroed(tmp_path, family):
    dense, compressed, kept = compress(tmp_path, family)
    model = tiny_models.load(compressed, dtype=torch.float32)
    expected = logits(pruning.zeroed(dense, kept))
    unpruned = logits(tiny_models.load(dense, dtype=torch.float32))
    assert (expected - unpruned).abs().max() > 0.5
    torch.testing.assert_close(logits(model), expected, **FLOAT32)


@pytest.mark.parametrize(
    ("name", "add"),
    [("deepseek_v3", drafts.add_deepseek_mtp), ("qwen2_moe", drafts.add_qwen_mtp)],
)
def test_layers_that_draft_tokens_and_other_parts_are_left_out(tmp_path, name, add):
    dense = tiny_models.save(name, tmp_path / "dense")
    add(dense)
    kept = pruning.prune(dense, tmp_path / "camera")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "camera", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    torch.testing.assert_close(logits(model), logits(pruning.zeroed(dense, kept)), **FLOAT32)


@pytest.mark.parametrize(
    "widths",
    [
        lambda expert, d_ff: 0,
        lambda expert, d_ff: d_ff,
        lambda expert, d_ff: 1 if expert == 5 else 0,
        lambda expert, d_ff: d_ff if expert == 0 else 0,
    ],
    ids=["nothing kept", "everything kept", "one micro-expert", "one expert holds all"],
)
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_extreme_widths_give_the_zeroed_model(tmp_path, name, widths):
    dense, compressed, kept = compress(tmp_path, name, widths)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(pruning.zeroed(dense, kept)), **FLOAT32)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v3"])
def test_plain_and_renormalised_routing_weights(tmp_path, name, norm_topk_prob):
    dense, compressed, kept = compress(tmp_path, name, norm_topk_prob=norm_topk_prob)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(pruning.zeroed(dense, kept)), **FLOAT32)


def test_generation_equals_the_zeroed_model(tmp_path, form):
    dense, compressed, kept = compress(tmp_path, form)
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    inputs = tokenizer("def main():", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model = tiny_models.load(compressed, dtype=torch.float32)
    generated = model.generate(inputs.input_ids, **options)
    expected = pruning.zeroed(dense, kept).generate(inputs.input_ids, **options)
    assert generated.tolist() == expected.tolist()
    assert tokenizer.decode(generated[0]).startswith("def main():")


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, "auto"),
    ],
)
def test_every_weight_has_the_asked_dtype(tmp_path, form, stored, asked):
    dense, compressed, _ = compress(tmp_path, form, dtype=stored)
    original, model = (tiny_models.load(path, dtype=asked) for path in (dense, compressed))
    # Some versions of transformers keep the routers of some families in float32.
    wanted = {name: p.dtype for name, p in original.named_parameters()}
    found = {name: p.dtype for name, p in model.named_parameters()}
    outside = found.keys() & wanted.keys()
    assert {name: found[name] for name in outside} == {name: wanted[name] for name in outside}
    assert {name for name in wanted.keys() - outside if "expert" not in name} == set()
    experts = {found[name] for name in found.keys() - outside}
    assert experts == {stored if asked == "auto" else asked}


def test_experts_take_the_memory_of_what_was_kept(tmp_path):
    _, compressed, kept = compress(tmp_path, "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(compressed)
    held = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name or ".shared_expert." in name
    )
    assert held == 3 * 64 * sum(len(rows) for rows in kept.values())


def test_sharded_checkpoint_loads_the_same(tmp_path):
    dense, compressed, kept = compress(tmp_path, "mixtral")
    tensors = load_file(compressed / "model.safetensors")
    (compressed / "model.safetensors").unlink()
    weight_map = {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        names = sorted(tensors)[part::3]
        save_file({n: tensors[n] for n in names}, compressed / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (compressed / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(pruning.zeroed(dense, kept)), **FLOAT32)


def _rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.experts.4.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"{NAME} .* is missing"),
        (lambda t: t.update({NAME: t[NAME][:, :-1].contiguous()}), f"{NAME} has shape"),
        (lambda t: t.update({NAME: t[NAME].T.contiguous()}), f"{NAME} has shape"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight .* is missing"),
        (
            lambda t: t.update(
                {NAME.replace("down_proj.weight", "down_proj.bias"): torch.ones(64)}
            ),
            "down_proj.bias is not part of this model",
        ),
        (
            lambda t: t.update({NAME.replace("experts.4", "experts.8"): torch.ones(64, 4)}),
            "experts.8.* is not part of this model",
        ),
    ],
    ids=["missing", "narrower", "transposed", "norm missing", "bias", "extra expert"],
)
def test_a_checkpoint_that_lies_is_refused_by_name(tmp_path, change, message):
    _, compressed, _ = compress(tmp_path, "qwen2_moe")
    _rewrite(compressed, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(compressed)


def test_negative_counts_in_the_config_are_refused(tmp_path):
    _, compressed, _ = compress(tmp_path, "qwen2_moe")
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.1.mlp"]["experts"][3] = [-1]
    (compressed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\[3\] counts \[-1\]"):
        AutoModelForCausalLM.from_pretrained(compressed)


def test_loading_from_a_state_dict_is_refused(tmp_path):
    _, compressed, _ = compress(tmp_path, "qwen2_moe")
    config = AutoConfig.from_pretrained(compressed)
    tensors = load_file(compressed / "model.safetensors")
    with pytest.raises(CheckpointError, match="from its checkpoint folder"):
        Qwen2MoeForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_save_pretrained_is_refused_and_writes_nothing(tmp_path):
    _, compressed, _ = compress(tmp_path, "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with pytest.raises(ValueError, match="camera and is not serializable"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_loaded_config_keeps_the_quantization_config(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    on_disk = json.loads((compressed / "config.json").read_text())["quantization_config"]
    held = AutoModelForCausalLM.from_pretrained(compressed).config.to_dict()["quantization_config"]
    assert held["layers"] == on_disk["layers"]
    assert held["quant_method"] == "camera"


def test_tensor_parallel_plans_leave_the_experts_whole(tmp_path):
    _, compressed, _ = compress(tmp_path, "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert not [name for name in model.tp_plan if "mlp" in name]


def test_a_model_without_a_head_gives_the_headed_one_s_hidden_states(tmp_path, form):
    dense, compressed, _ = compress(tmp_path, form)
    headed = tiny_models.load(compressed, dtype=torch.float32)
    bare, said = AutoModel.from_pretrained(
        compressed, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        expected = headed(PROMPT, output_hidden_states=True).hidden_states[-1]
        found = bare(PROMPT).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The report names the head, as it does for the original, and no expert of the model's layers.
    wanted = AutoModel.from_pretrained(dense, output_loading_info=True)[1]
    for report in (said, wanted):
        names = report["unexpected_keys"]
        report["unexpected_keys"] = {n for n in names if not n.startswith("model.layers.3.")}
    assert said == wanted


def test_the_text_part_of_a_model_that_sees_pictures_loads_alone(tmp_path):
    dense, compressed, kept = compress(tmp_path, "qwen3_5_moe")
    model, said = AutoModelForCausalLM.from_pretrained(
        compressed, dtype=torch.float32, output_loading_info=True
    )
    assert not hasattr(model.model, "visual")
    assert not any(said.values())
    torch.testing.assert_close(logits(model), logits(pruning.zeroed(dense, kept)), **FLOAT32)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_pictures_are_seen_as_by_the_zeroed_model(tmp_path, name):
    dense, compressed, kept = compress(tmp_path, name)
    place = 7
    tokens = torch.tensor([[5, 9, *[place] * 4, 31, 8]])
    picture = {
        "pixel_values": torch.randn(16, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == place).int(),
    }
    answers = []
    for model in (pruning.zeroed(dense, kept), tiny_models.load(compressed, dtype=torch.float32)):
        model.config.image_token_id = model.model.config.image_token_id = place
        with torch.no_grad():
            answers.append(model(tokens, **picture).logits)
    torch.testing.assert_close(*answers, **FLOAT32)
    assert (answers[0] - logits(model, tokens)).abs().max() > 1


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_5_moe", "qwen3_vl_moe"])
def test_the_card_names_a_class_that_loads_the_model(tmp_path, name):
    dense = tiny_models.save(name, tmp_path / "dense")
    quantized.compress(dense, tmp_path / "camera", "16:0.5,0:0.5")
    card = (tmp_path / "camera" / "README.md").read_text()
    (auto_class,) = re.findall(r"`(AutoModel\w+)\.from_pretrained", card)
    model = getattr(transformers, auto_class).from_pretrained(tmp_path / "camera")
    assert logits(model).isfinite().all()


def test_registration_is_repeatable():
    camera_serve.hf.register()
    camera_serve.hf.register()


@pytest.mark.parametrize("plan", ["3:0.2,2:0.6,1:0.2", "16:0.1,8:0.1,4:0.2,2:0.3,0:0.3"])
def test_packed_tiers_give_the_model_with_the_weights_they_stand_for(tmp_path, form, plan):
    dense = tiny_models.save(form, tmp_path / "dense", dtype=torch.float32)
    quantized.compress(dense, tmp_path / "camera", plan)
    model = tiny_models.load(tmp_path / "camera", dtype=torch.float32)
    expected = logits(quantized.dequantized(dense, tmp_path / "camera"))
    unchanged = logits(tiny_models.load(dense, dtype=torch.float32))
    assert (expected - unchanged).abs().max() > 0.5
    torch.testing.assert_close(logits(model), expected, **FLOAT32)


def test_packed_tiers_stay_packed_in_memory(tmp_path):
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense")
    quantized.compress(dense, tmp_path / "camera", "2:1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "camera")
    held = sum(b.nbytes for n, b in model.named_buffers() if ".experts." in n)
    # 2 layers × 8 experts × 64 micro-experts × 3 vectors of 64 codes of 2 bits and 2 × 2 × 16 bits.
    assert held == 2 * 8 * 64 * 3 * (64 * 2 // 8 + 2 * 2 * 2)
