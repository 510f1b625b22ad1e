from pathlib import Path

import pytest

from bench.shapes.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "16:0.9"], "fractions must sum to 1"),
        (["--vocab", "100"], "the tokenizer alone has 2048 tokens"),
        (["--plan", "16:0.5,0:0.5", "--align", "7"], "use --align 32"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["shapes", "qwen3-30b-a3b", str(tmp_path / "out"), "--layers", "1", *arguments]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_no_mistake_in_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shapes", "qwen3-30b-a3b", str(tmp_path), "--layers", "1", "--vocab", "2048"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists: choose another name\n"
