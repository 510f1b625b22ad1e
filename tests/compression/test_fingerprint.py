"""Files of weights told apart by samples: what is seen, what is not, and what it costs."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve.compression.fingerprint import BLOCK, explain, weights_digest

EXPERTS = 24
ROWS, COLUMNS = 512, 256


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of experts of 256 KiB each, of which 8 KiB are read, and a small norm."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.up_proj.weight": torch.randn(
            ROWS, COLUMNS, generator=generator
        ).bfloat16()
        for expert in range(EXPERTS)
    }
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(COLUMNS, dtype=torch.bfloat16)
    file = tmp_path_factory.mktemp("weights") / "model-00001-of-00001.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def edited(weights: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, folder / weights.name, metadata={"format": "pt"})
    return weights_digest(folder / weights.name)


def expert(number: int) -> str:
    return f"model.layers.0.mlp.experts.{number}.up_proj.weight"


def _another_training(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(1.01)


def _one_norm_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"][77] = 2


def _low_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[expert(11)] += 0.01 * torch.outer(torch.randn(ROWS), torch.randn(COLUMNS)).bfloat16()


def _tail_of_every_expert(tensors: dict[str, torch.Tensor]) -> None:
    for number in range(EXPERTS):
        tensors[expert(number)][-ROWS // 5 :] = 0


def _one_column_of_every_expert(tensors: dict[str, torch.Tensor]) -> None:
    for number in range(EXPERTS):
        tensors[expert(number)][:, 3] = 0


def _swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors[expert(4)], tensors[expert(9)] = tensors[expert(9)], tensors[expert(4)]


@pytest.mark.parametrize(
    "change",
    [
        _another_training,
        _one_norm_value,
        _low_rank,
        _tail_of_every_expert,
        _one_column_of_every_expert,
        _swapped,
    ],
)
def test_what_people_do_to_weights_is_seen(
    weights: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    assert edited(weights, tmp_path, change) != weights_digest(weights)


@pytest.mark.parametrize("number", range(EXPERTS))
def test_an_edit_of_any_one_tensor_is_seen(weights: Path, tmp_path: Path, number: int) -> None:
    found = edited(weights, tmp_path, lambda tensors: tensors[expert(number)].add_(0.001))
    assert found != weights_digest(weights)


def test_an_edit_of_a_part_of_one_tensor_is_seen_as_often_as_promised(
    weights: Path, tmp_path: Path
) -> None:
    # 10% of the rows of one expert, anywhere: about twice as likely, block size aside.
    seen, places, before = 0, random.Random(3), weights_digest(weights)
    for number in range(EXPERTS):
        first = places.randrange(ROWS - ROWS // 10)

        def edit(tensors: dict[str, torch.Tensor], number: int = number, at: int = first) -> None:
            tensors[expert(number)][at : at + ROWS // 10] *= 2

        seen += edited(weights, tmp_path, edit) != before
    assert 0.1 < seen / EXPERTS < 0.5


def test_a_copy_is_the_same_and_a_part_of_it_is_not(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(weights, tmp_path / "another name.safetensors"))
    os.utime(copy, (0, 0))
    assert weights_digest(copy) == weights_digest(weights)
    with copy.open("ab") as file:
        file.truncate(copy.stat().st_size - 1)
    assert weights_digest(copy) != weights_digest(weights)


def test_a_download_with_a_hole_is_seen(weights: Path, tmp_path: Path) -> None:
    # As one that was given its full size first, and stopped: 3 tensors of it are zeros.
    copy = Path(shutil.copyfile(weights, tmp_path / weights.name))
    with copy.open("r+b") as file:
        file.seek(copy.stat().st_size // 2)
        file.write(bytes(3 * ROWS * COLUMNS * 2))
    assert weights_digest(copy) != weights_digest(weights)


def test_other_names_or_shapes_of_the_same_bytes_are_seen(weights: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = tensors.pop(expert(0))

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[expert(0)] = tensors[expert(0)].view(COLUMNS, ROWS)

    found = {edited(weights, tmp_path, change) for change in (rename, reshape)}
    assert len(found | {weights_digest(weights)}) == 3


def sparse(file: Path, tensors: int, values: int) -> Path:
    """Weights of zeros that take no room on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for number in range(tensors):
        offsets = [2 * values * number, 2 * values * (number + 1)]
        header[f"t{number}"] = {"dtype": "BF16", "shape": [values], "data_offsets": offsets}
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + 2 * values * tensors)
    return file


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize("gigabytes", [1, 100, 1000])
def test_its_cost_does_not_grow_with_the_file(tmp_path: Path, gigabytes: int) -> None:
    file = sparse(tmp_path / "model.safetensors", 10, gigabytes * 10**9 // 20)
    assert file.stat().st_size > gigabytes * 10**9
    before = bytes_read()
    weights_digest(file)
    # /proc/self/io itself, the header, and what a buffered file reads ahead of it.
    assert bytes_read() - before < 10 * 16 * BLOCK + 100_000


FOUND = {
    "format": "2",
    "file config.json": "a",
    "file model.safetensors": "b",
    "calibration tokens": "c",
    "recipe.calibration.samples": "4",
    "threads": "8",
    "transformers": "5.10",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"file model.safetensors": "x"}, "file model.safetensors of the model differs: use the"),
        (
            {"file model.safetensors": "x", "file config.json": "y"},
            "2 files of the model differ, config.json among them: use the",
        ),
        ({"file tokenizer.json": "new"}, "file tokenizer.json of the model differs"),
        ({"threads": "2"}, "threads: then 8, now 2 (set OMP_NUM_THREADS=8)"),
        ({"transformers": "5.19"}, "then 5.10, now 5.19 (pip install transformers==5.10)"),
        ({"recipe.alpha": "0.5"}, "alpha: then unset, now 0.5"),
        ({"calibration tokens": "x"}, "the calibration text gives other tokens"),
        ({"format": "3"}, "by another version of camera-serve"),
    ],
)
def test_differences_are_told_in_words(changes: dict[str, str], words: str) -> None:
    assert words in explain(FOUND, FOUND | changes)
    assert bool(explain(FOUND, FOUND | changes)) == bool(changes)


def test_threads_are_no_news_beside_another_device() -> None:
    found = explain(FOUND | {"device": "cpu"}, {**FOUND, "device": "cuda", "threads": "unset"})
    assert found == "from other inputs: device: then cpu, now cuda (--device cpu)"


def test_other_tokens_are_no_news_beside_their_cause() -> None:
    tokens = {"calibration tokens": "x"}
    for cause in ({"file tokenizer.json": "new"}, {"recipe.calibration.samples": "5"}):
        assert "gives other tokens" not in explain(FOUND, FOUND | tokens | cause)
    assert "gives other tokens" in explain(FOUND, FOUND | tokens | {"threads": "2"})
