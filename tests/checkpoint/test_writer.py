from pathlib import Path

import torch

from camera_serve.checkpoint.writer import write_shard, write_text


def test_shards_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_text(tmp_path / "b.txt", "x")
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert len(modes) == 1
