"""`camera-serve convert`: the dense way out, by command."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import pruning
from tests.cli.conftest import Run
from tests.editing import digest


@pytest.fixture
def compressed(model: Path, tmp_path: Path) -> Path:
    pruning.prune(model, tmp_path / "compressed")
    return tmp_path / "compressed"


def test_dense_output_has_the_original_width_again(
    run: Run, model: Path, compressed: Path, tmp_path: Path
) -> None:
    before = digest(compressed)
    output = tmp_path / "dense"
    result = run("convert", compressed, "--to", "dense", "-o", output)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(f"next: vllm serve {output}")
    assert digest(compressed) == before
    shown = run("inspect", output).stdout
    assert "none: a dense checkpoint" in shown
    tensors: dict[str, torch.Tensor] = {}
    for file in output.glob("*.safetensors"):
        tensors |= load_file(file)
    original = load_file(model / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in original.items()}
    assert tensors["model.layers.0.mlp.experts.0.up_proj.weight"].count_nonzero() == 0


def test_an_existing_output_and_a_dense_source_are_refused(
    run: Run, model: Path, compressed: Path, tmp_path: Path
) -> None:
    before = digest(tmp_path)
    for source, output in ((compressed, compressed), (model, tmp_path / "new")):
        result = run("convert", source, "--to", "dense", "-o", output)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
    assert digest(tmp_path) == before


def test_an_unknown_format_is_a_usage_error(run: Run, compressed: Path, tmp_path: Path) -> None:
    result = run("convert", compressed, "--to", "gguf", "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "--to" in result.stderr
