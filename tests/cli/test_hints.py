"""Commands that the CLI prints to be copied: a shell reads back the very paths."""

import shlex
import shutil
from pathlib import Path

import pytest

from tests import pruning
from tests.cli.conftest import Run

NAMES = (
    *("two words", "it's", 'a "quote"', "$HOME", "-rf", "--plan", "~root", "a;b&c|d", "`id`"),
    *("*", "a\nb", "\\", "#1", "Größe", "!!"),
)


def _next(stdout: str) -> list[str]:
    """The words of the command after `next: `, the last thing a command says."""
    return shlex.split(stdout.rpartition("; next: ")[2])


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_to_serve_is_the_one_written(run: Run, model: Path, name: str) -> None:
    pruning.prune(model, Path("compressed"))
    result = run("convert", "compressed", "--to", "dense", f"--output={name}")
    assert result.exit_code == 0, result.output
    *serve, path = _next(result.stdout)
    assert serve == ["vllm", "serve"]
    assert not path.startswith("-")
    assert Path(path).resolve() == Path(name).resolve()
    assert Path(path, "config.json").is_file()


def test_compress_and_analyze_quote_too(run: Run, model: Path, small: list[str]) -> None:
    shutil.copytree(model, "-my $MODEL")
    made = run("compress", "./-my $MODEL", "--output=-it's", "--prune", 0.5, *small)
    assert _next(made.stdout) == ["vllm", "serve", "./-it's"]
    ranked = run("analyze", "-o", "ranking", *small, "--", "-my $MODEL")
    assert ranked.exit_code == 0, ranked.output
    command, *arguments = _next(ranked.stdout)
    assert command == "camera-serve"
    assert arguments[:2] == ["compress", "./-my $MODEL"]
    # What is copied runs.
    assert run(*arguments, *small, "--dry-run").exit_code == 0
