"""Models whose experts are stored fused, through every command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from tests import tiny_models
from tests.cli.conftest import Run
from tests.editing import digest

EXPERTS = "model.layers.1.mlp.experts"
GATE_UP = f"{EXPERTS}.gate_up_proj"


def weights(folder: Path) -> dict[str, str]:
    return {name: hash for name, hash in digest(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "family", [family for family in tiny_models.FORMS if family in tiny_models.SAVED_AS_PUBLISHED]
)
def test_every_command_makes_the_same_of_a_fused_model(
    family: str, tmp_path: Path, run: Run, small: list[str]
) -> None:
    original = tiny_models.save(family, tmp_path / "a" / "model")
    fused = tiny_models.save(family, tmp_path / "b" / "model", original_format=False)
    for model in (original, fused):
        out = model.parent
        for command in (
            ["compress", model, "-o", out / "pruned", "--prune", "0.4", "--align", "4", *small],
            ["analyze", model, "-o", out / "analysis", *small],
            ["convert", out / "pruned", "--to", "dense", "-o", out / "dense"],
        ):
            result = run(*command)
            assert result.exit_code == 0, result.output
    for folder in ("pruned", "analysis", "dense"):
        found, wanted = weights(fused.parent / folder), weights(original.parent / folder)
        assert found == wanted
        assert found
    verified = [
        json.loads(run("verify", fused.parent / "pruned", "--against", model, "--json").stdout)
        for model in (fused, original)
    ]
    assert verified[0]["layers"] == verified[1]["layers"] != []
    inspected = [json.loads(run("inspect", m, "--json").stdout) for m in (fused, original)]
    assert inspected[0].pop("path") != inspected[1].pop("path")
    assert inspected[0] == inspected[1]


def test_packed_tiers_of_a_fused_model_have_the_same_bytes(
    tmp_path: Path, run: Run, small: list[str]
) -> None:
    plan = ["--plan", "16:0.2,3:0.3,1:0.3,0:0.2", "--align", "4", "--group-size", "32"]
    for name, original_format in (("a", True), ("b", False)):
        model = tiny_models.save(
            "mixtral", tmp_path / name / "model", original_format=original_format
        )
        out = model.parent / "out"
        assert run("compress", model, "-o", out, *plan, *small).exit_code == 0
    assert weights(tmp_path / "a" / "out") == weights(tmp_path / "b" / "out")


def test_a_compressed_checkpoint_stores_its_experts_one_by_one(
    tmp_path: Path, run: Run, small: list[str]
) -> None:
    model = tiny_models.save("qwen2_moe", tmp_path / "model", original_format=False)
    out = tmp_path / "out"
    assert run("compress", model, "-o", out, "--plan", "16:1", *small).exit_code == 0
    shard = out / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    names = [f"{EXPERTS}.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
    gates, ups, downs = (torch.stack([tensors.pop(n) for n in names[i::3]]) for i in range(3))
    tensors |= {GATE_UP: torch.cat([gates, ups], dim=1), f"{EXPERTS}.down_proj": downs}
    save_file(tensors, shard, metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {
        name: file for name, file in data["weight_map"].items() if name not in names
    } | dict.fromkeys(tensors, shard.name)
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight .* is missing"):
        Checkpoint.open(out)
