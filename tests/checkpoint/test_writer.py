import json
from pathlib import Path

import pytest
import torch

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.writer import (
    copy_side_files,
    publish,
    serving_config,
    write_shard,
    write_text,
)
from tests import tiny_models
from tests.editing import edit_config


def test_shards_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_text(tmp_path / "b.txt", "x")
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_an_output_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, output, rename = tmp_path / "out.partial", tmp_path / "out", Path.rename
    for folder, text in ((partial, "new"), (output, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)

    def refused(self: Path, target: Path) -> Path:
        if self == partial:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        publish(partial, output)
    assert (output / "file").read_text() == "old" and (partial / "file").read_text() == "new"
    monkeypatch.undo()
    publish(partial, output)
    assert (output / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out"]


def test_what_a_family_spells_out_is_said_where_its_text_part_is_described(tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_vl_moe", tmp_path / "model")
    said = serving_config(Checkpoint.open(path), None)
    edit_config(path, lambda config: config["text_config"].pop("norm_topk_prob"))
    found = serving_config(Checkpoint.open(path), None)
    assert found["text_config"]["norm_topk_prob"] is True
    assert found == said


@pytest.mark.parametrize("fast", [False, True])
def test_a_tokenizer_of_code_is_told_where_nothing_stands_in_for_it(
    fast: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    code = {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}, "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(code))
    (source / "tiktoken.model").write_text("aGU= 0")
    if fast:
        (source / "tokenizer.json").write_text("{}")
    with caplog.at_level("WARNING"):
        copy_side_files(source, target)
    assert ("--trust-remote-code" in caplog.text) != fast
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
