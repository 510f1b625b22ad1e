"""What lies beside the weights: OUT tokenizes, renders, processes and generates as MODEL does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
import torch
from camera_serve.converters.dense import convert_to_dense
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    GPT2Tokenizer,
    LlamaTokenizer,
    LlavaProcessor,
    PhobertTokenizer,
)

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.checkpoint.files import NOT_DOWNLOADED, side_files
from camera_serve.checkpoint.format import MARKER_FILE
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.report import CONVERSION_FILE
from camera_serve.checkpoint.writer import copy_side_files
from tests import tiny_models
from tests.editing import digest

TEXT = "The 7 quick foxes jump\n\tover it — naïvely."
MESSAGES = [{"role": "user", "content": TEXT}]
TEMPLATES = {
    "default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "tool_use": "{{ tools | tojson }}{{ messages[0].content }}",
    "rag": "{{ documents | tojson }}{{ messages[0].content }}",
}
MISTRAL = (
    Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with every kind of file beside its weights that transformers and vLLM read."""
    path = tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("files") / "model")
    tokenizer = tiny_models.tokenizer()
    images = CLIPImageProcessor(size={"height": 24, "width": 24}, do_center_crop=False)
    processor = LlavaProcessor(images, tokenizer, patch_size=8, chat_template=TEMPLATES)
    processor.save_pretrained(path)
    images.save_pretrained(path)
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[1, 5]).save_pretrained(path)
    shutil.copyfile(MISTRAL, path / "tokenizer.model.v3")
    _add_embedding_modules(path)
    for name in ("LICENSE", "USE_POLICY.md", "README.md"):
        (path / name).write_text(f"{name} of the original\n")
    return path


def _add_embedding_modules(path: Path) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": number, "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for number, (folder, kind) in enumerate(kinds.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    settings = {
        "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
        "2_Dense/config.json": {"in_features": 64, "out_features": 16, "bias": False},
        "sentence_bert_config.json": {"max_seq_length": 96, "do_lower_case": False},
    }
    for name, values in settings.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(values))
    save_file({"linear.weight": torch.ones(16, 64)}, path / "2_Dense" / "model.safetensors")


def compressed(model: Path, out: Path) -> Path:
    text = out.with_name("text.txt")
    text.write_text(Path(__file__).read_text())
    calibration = Calibration(source=str(text), samples=2, seq_len=64)
    compress(model, out, Recipe.paper(plan=TierPlan.prune(0.4), calibration=calibration))
    return out


@pytest.fixture(scope="module", params=["compress", "convert"])
def out(request: pytest.FixtureRequest, model: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "compress":
        return compressed(model, folder / "out")
    convert_to_dense(compressed(model, folder / "compressed"), folder / "out")
    return Path(folder / "out")


def test_tokens_are_the_same(model: Path, out: Path) -> None:
    wanted = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == wanted
    assert len(wanted) > 10


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_every_template_are_the_same(model: Path, out: Path, name: str) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    documents = [{"title": "a", "text": "b"}]
    for kind in (AutoTokenizer, AutoProcessor):
        found, wanted = (
            kind.from_pretrained(folder).apply_chat_template(
                MESSAGES, chat_template=name, tools=tools, documents=documents, tokenize=False
            )
            for folder in (out, model)
        )
        assert found == wanted
        assert TEXT in found


def test_prompts_with_tools_are_the_same_when_no_template_is_named(model: Path, out: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    found, wanted = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )
        for folder in (out, model)
    )
    assert found == wanted
    assert '"add"' in found


def test_images_are_processed_the_same(model: Path, out: Path) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    for kind in (AutoImageProcessor, AutoProcessor):
        settings = [kind.from_pretrained(folder).to_dict() for folder in (out, model)]
        assert settings[0] == settings[1]
    pixels = [
        AutoProcessor.from_pretrained(folder).image_processor(image, return_tensors="pt")
        for folder in (out, model)
    ]
    assert pixels[0]["pixel_values"].shape == (1, 3, 24, 24)
    assert pixels[0]["pixel_values"].equal(pixels[1]["pixel_values"])


def test_generation_settings_are_the_same(model: Path, out: Path) -> None:
    found, wanted = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (out, model))
    assert found == wanted
    assert (found["temperature"], found["eos_token_id"]) == (0.6, [1, 5])


def test_vllm_finds_the_same_tokenizers_and_embedding_modules(model: Path, out: Path) -> None:
    from vllm.tokenizers import get_tokenizer
    from vllm.transformers_utils import config

    for mode in ("hf", "mistral"):
        found, wanted = (
            get_tokenizer(str(folder), tokenizer_mode=mode).encode(TEXT) for folder in (out, model)
        )
        assert found == wanted
    assert config.get_pooling_config(str(out))["seq_pooling_type"] == "LAST"
    assert config.get_sentence_transformer_tokenizer_config(str(out))["max_seq_length"] == 96
    dense = config.try_get_dense_modules(str(out))
    assert dense == config.try_get_dense_modules(str(model))
    assert dense[0]["folder"] == "2_Dense"
    assert load_file(out / "2_Dense" / "model.safetensors")["linear.weight"].equal(
        torch.ones(16, 64)
    )


def test_licence_and_terms_arrive_and_the_card_is_not_the_original_s(
    model: Path, out: Path
) -> None:
    for name in ("LICENSE", "USE_POLICY.md"):
        assert (out / name).read_text() == (model / name).read_text()
    card = out / "README.md"
    assert not card.exists() or "of the original" not in card.read_text()


def test_a_converted_folder_keeps_nothing_that_compress_wrote(model: Path, tmp_path: Path) -> None:
    convert_to_dense(compressed(model, tmp_path / "compressed"), tmp_path / "out")
    extra = digest(tmp_path / "out").keys() - digest(model).keys()
    shards = {file.name for file in (tmp_path / "out").glob("model-*.safetensors")}
    assert extra == shards | {"model.safetensors.index.json", CONVERSION_FILE}


STALE = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.fp16.json",
    "consolidated.safetensors",
    "consolidated.safetensors.index.json",
    "params.json",
    "tf_model.h5",
    "model-q4.gguf",
    "adapter_config.json",
    "adapter_model.safetensors",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "modeling_own.py",
    "training_args.bin",
    "diagram.png",
    ".gitattributes",
    ".git/config",
    ".git/lfs/tokenizer.json",
    ".cache/huggingface/download/tokenizer.json.metadata",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "onnx/model.onnx",
    "onnx/config.json",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/tokenizer.json",
    "checkpoint-500/additional_chat_templates/rag.jinja",
    "2_Dense/helper.py",
)


def test_nothing_that_names_other_weights_no_code_and_no_cache_arrives(
    model: Path, tmp_path: Path
) -> None:
    wanted = side_files(model)
    crowded = Path(shutil.copytree(model, tmp_path / "model"))
    for name in STALE:
        (crowded / name).parent.mkdir(parents=True, exist_ok=True)
        (crowded / name).write_text("{}")
    assert side_files(crowded) == wanted
    assert Checkpoint.open(crowded).total_bytes == Checkpoint.open(model).total_bytes


def test_a_module_folder_is_known_from_modules_json_alone(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "modules.json").write_text("not JSON")
    assert Path("2_Dense/config.json") not in side_files(copy)
    assert Path("1_Pooling/config.json") in side_files(copy)


def _linked(source: Path, target: Path) -> Path:
    """`source` as the hub's cache has it: every file a link to a blob elsewhere."""
    blobs = target.with_name("blobs")
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in source.rglob("*") if f.is_file())):
        shutil.copyfile(file, blobs / str(number))
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return target


def test_a_folder_of_links_gives_the_same_real_files(model: Path, tmp_path: Path) -> None:
    snapshot = _linked(model, tmp_path / "snapshots" / "model")
    found = compressed(snapshot, tmp_path / "out")
    assert not [file for file in found.rglob("*") if file.is_symlink()]
    for name in side_files(model):
        assert (found / name).read_bytes() == (model / name).read_bytes()


def test_linked_folders_are_followed_and_loops_and_dead_links_are_not(
    model: Path, tmp_path: Path
) -> None:
    wanted = side_files(model)
    farm = tmp_path / "family" / "model"
    farm.mkdir(parents=True)
    for entry in model.iterdir():
        (farm / entry.name).symlink_to(entry)
    (tmp_path / "family" / "neighbour.json").write_text("{}")
    (farm / "self").symlink_to(farm)
    (farm / "up").symlink_to("..")
    (farm / "dead.json").symlink_to("nowhere.json")
    assert side_files(farm) == wanted


def _sentencepiece(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, minloglevel=2
    )
    text.unlink()


def _pairs(folder: Path) -> None:
    letters = {letter: number for number, letter in enumerate(sorted(set(TEXT) - {" "}))}
    (folder / "vocab.json").write_text(json.dumps(letters | {"Ġ": 90, "qu": 91, "<unk>": 92}))
    (folder / "merges.txt").write_text("#version: 0.2\nq u\n")


def _words(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nquick\nfox\n##es\n")


def _codes(folder: Path) -> None:
    (folder / "vocab.txt").write_text("quick 10\nfo@@ 9\nxes 8\n")
    (folder / "bpe.codes").write_text("q u 9\nqu i 8\nqui c 7\nquic k</w> 6\nf o 5\nx e 4\n")


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (_sentencepiece, LlamaTokenizer),
        (_pairs, GPT2Tokenizer),
        (_words, BertTokenizer),
        (_codes, PhobertTokenizer),
    ],
)
def test_tokenizers_of_every_kind_of_file_arrive(
    tmp_path: Path, write: Callable[[Path], None], kind: Any
) -> None:
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
    write(tmp_path / "model")
    copy_side_files(tmp_path / "model", tmp_path / "out")
    found, wanted = (
        kind.from_pretrained(tmp_path / name).tokenize("quick foxes") for name in ("out", "model")
    )
    assert found == wanted
    assert len(set(found)) > 1


def test_settings_name_no_code_that_was_left_behind(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        settings = json.loads((copy / name).read_text())
        settings["auto_map"] = {"AutoTokenizer": ["own_code.OwnTokenizer", None]}
        (copy / name).write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    copy_side_files(copy, tmp_path / "out")
    shutil.copyfile(model / "config.json", tmp_path / "out" / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    for file in (tmp_path / "out").glob("*.json"):
        assert "own_code" not in file.read_text()


def test_the_hub_is_asked_for_what_is_carried_and_for_the_weights(model: Path) -> None:
    own = [*digest(model), "2_Dense/pytorch_model.bin", "model.safetensors.index.json"]
    found = filter_repo_objects([*own, *STALE], ignore_patterns=list(NOT_DOWNLOADED))
    extra = {"original/tokenizer.model", "onnx/config.json", MARKER_FILE}
    extra |= {name for name in STALE if name.startswith("checkpoint-500/")}
    assert set(found) - extra == set(own)
