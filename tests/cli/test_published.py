"""Originals that are published quantized, through the commands: what is said of their size."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camera_serve.cli.formatting import human_bytes
from tests import tiny_models
from tests.cli.conftest import Run
from tests.editing import WEIGHTS, edit_config
from tests.originals import FP8_BLOCKS, publish


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("models") / "dense")
    publish(dense, dense.with_name("fp8"), FP8_BLOCKS)
    return dense.with_name("fp8")


@pytest.mark.parametrize("share", ["0.2", "0.9"])
def test_sizes_are_compared_with_16_bits_and_with_what_is_published(
    fp8: Path, run: Run, small: list[str], tmp_path: Path, share: str
) -> None:
    on_disk = sum(tensor.nbytes for tensor in load_file(fp8 / WEIGHTS).values())
    compress = ["compress", fp8, "-o", tmp_path / "out", "--prune", share, "--align", "4", *small]
    for more in (["--dry-run"], []):
        said = run(*compress, *more).stdout
        assert "published as    fp8 (FP8 in blocks of 128×128); above it is counted in 16" in said
        assert f"bytes         {human_bytes(on_disk)}, " in said
        change = re.search(r"checkpoint    ([\d.]+)% (larger|smaller) than that", said)
        assert change and change[2] == ("larger" if share == "0.2" else "smaller")
    smaller = re.search(r"expert weights .* \(([\d.]+)% smaller\)", said)
    assert smaller and float(smaller[1]) == pytest.approx(100 * float(share), abs=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| original, in 16 bits |" in card
    assert "published as fp8 (FP8 in blocks of 128×128), in 0.000 GB" in card
    assert run("verify", tmp_path / "out", "--against", fp8).exit_code == 0


def test_inspect_tells_what_is_published(fp8: Path, run: Run) -> None:
    said = run("inspect", fp8).stdout
    assert "none: a dense checkpoint, published as fp8 (FP8 in blocks of 128×128)" in said
    assert re.search(r"in all, .* in experts: 16\.00 bits .*; .* in all as published", said)


def test_a_model_in_16_bits_is_spoken_of_as_before(
    model: Path, run: Run, small: list[str], tmp_path: Path
) -> None:
    said = run("compress", model, "-o", tmp_path / "out", "--prune", "0.4", *small).stdout
    assert "published" not in said + (tmp_path / "out" / "README.md").read_text()
    assert "published" not in run("inspect", model).stdout


def test_a_method_that_is_not_read_is_named_with_those_that_are(
    fp8: Path, run: Run, tmp_path: Path, small: list[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in fp8.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    edit_config(model, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    result = run("compress", model, "-o", tmp_path / "out", "--prune", "0.4", *small)
    assert result.exit_code == 1
    for word in ("config.json", "'awq'", "16-bit checkpoint", "fp8", "mxfp4", "compressed-tensors"):
        assert word in result.stderr


def test_what_is_outside_the_experts_stays_in_fp8_when_asked(
    fp8: Path, run: Run, small: list[str], tmp_path: Path
) -> None:
    compress = ["compress", fp8, "-o", tmp_path / "kept", "--prune", "0.4", "--keep-fp8", *small]
    said = run(*compress, "--dry-run").stdout + run(*compress).stdout
    size = sum(t.nbytes for f in (tmp_path / "kept").glob("*.safetensors") for t in _tensors(f))
    assert (
        f"next, on a GPU or a CPU with AMX, as it holds FP8: vllm serve {tmp_path / 'kept'}" in said
    )
    assert f"checkpoint      {human_bytes(size)}" in said
    assert f"-> {human_bytes(size)} (" in said
    assert run("verify", tmp_path / "kept", "--against", fp8).exit_code == 0
    recipe = tmp_path / "kept" / "camera_recipe.yaml"
    again = run("compress", fp8, "-o", tmp_path / "again", "--recipe", recipe)
    assert again.exit_code == 0
    assert (tmp_path / "again" / "config.json").read_text().count("outside_experts") == 1


def _tensors(file: Path) -> list[torch.Tensor]:
    return list(load_file(file).values())


def test_a_16_bit_model_has_no_fp8_to_keep(
    model: Path, run: Run, small: list[str], tmp_path: Path
) -> None:
    result = run("compress", model, "-o", tmp_path / "o", "--prune", "0.4", "--keep-fp8", *small)
    assert result.exit_code == 1
    assert re.search("--keep-fp8: .* holds 16-bit weights: start without --keep-fp8", result.stderr)
    assert not (tmp_path / "o").exists()
