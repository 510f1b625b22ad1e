"""A loader that does not know CAMERA stops and says what to do, instead of guessing weights.

Each test runs in a process that imports transformers alone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from camera_serve.converters.dense import convert_to_dense

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.writer import serving_config
from tests import editing, quantized, tiny_models

LOADERS = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers import AutoModelForImageTextToText

def every_way(path):
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    yield lambda: AutoModelForCausalLM.from_pretrained(path)
    yield lambda: AutoModelForCausalLM.from_pretrained(path, config=config, dtype="auto")
    yield lambda: AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)
    yield lambda: AutoModel.from_pretrained(path)
    yield lambda: type(AutoModelForCausalLM.from_config(config)).from_pretrained(path)
    yield lambda: pipeline("text-generation", model=path, tokenizer=tokenizer)
    if hasattr(config, "text_config"):
        yield lambda: AutoModelForImageTextToText.from_pretrained(path)

def refusal(load):
    try:
        load()
    except ValueError as error:
        return str(error)

print(json.dumps([[refusal(load) for load in every_way(path)] for path in sys.argv[1:]]))
assert not [name for name in sys.modules if name.startswith("camera_serve")]
"""
WAYS = 6


def refusals(*folders: Path) -> list[list[str | None]]:
    """What plain transformers says of each folder, loaded in every way; None where it loads."""
    command = [sys.executable, "-c", LOADERS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {len(ways) for ways in found} <= {WAYS, WAYS + 1}
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    for family, plan, name in (
        ("qwen2_moe", "3:0.2,2:0.6,1:0.2", "packed"),
        ("mixtral", "16:0.6,0:0.4", "pruned"),
        ("deepseek_v3", "16:0.5,4:0.3,0:0.2", "both"),
        ("qwen3_5_moe", "3:0.2,2:0.6,1:0.2", "with pictures"),
    ):
        dense = tiny_models.save(family, root / family, dtype=torch.float32)
        quantized.compress(dense, root / name, plan)
    convert_to_dense(root / "packed", root / "converted")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def test_compressed_checkpoints_are_refused_with_the_remedy_and_converted_ones_load(
    folders: dict[str, Path],
) -> None:
    names = ("packed", "pruned", "both", "with pictures", "converted")
    *compressed, converted = refusals(*(folders[name] for name in names))
    assert converted == [None] * WAYS
    for ways in compressed:
        for said in ways:
            assert said is not None
            assert "pip install camera-serve" in said and "import camera_serve.hf" in said


def test_what_an_original_says_of_its_weights_is_not_said_of_the_files_written_for_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_models.save("qwen2_moe", tmp_path / "dense")
    editing.edit_config(source, lambda c: c.update(transformers_weights="model.safetensors"))
    assert "transformers_weights" not in serving_config(Checkpoint.open(source), None)
    compressed = Checkpoint.open(folders["packed"])
    assert "transformers_weights" not in serving_config(compressed, None)
