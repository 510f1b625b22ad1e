"""Exit codes: 2 for a command line that is wrong whatever the files and the machine, else 1."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from camera_serve.cli import main
from tests.cli.conftest import Run

NOWHERE = "no/such/model"
"""Not looked for where the command line is wrong, and not there where it is right."""

RIGHT: dict[str, list[str]] = {
    "analyze": [NOWHERE, "-o", "out"],
    "compress": [NOWHERE, "-o", "out", "--bits", "2"],
    "inspect": [NOWHERE],
    "verify": [NOWHERE],
    "convert": [NOWHERE, "--to", "dense", "-o", "out"],
    "bench": [NOWHERE, "-o", "out.json"],
}
NUMBERS = (click.types.IntParamType, click.types.FloatParamType, click.Choice)
WAYS = {"prune", "plan", "recipe"}
"""In place of --bits."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every command runs in an empty folder, and leaves it empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir() == []


def bad_values() -> Iterator[tuple[str, str, str]]:
    """Every flag that takes a number or one of a few words, with values that are none of its."""
    for name, command in main.commands.items():
        for option in command.params:
            if not isinstance(option, click.Option) or not isinstance(option.type, NUMBERS):
                continue
            values = ["many", "-1", ""]
            if isinstance(option.type, click.types.FloatParamType):
                values += [str(math.nan), str(math.inf)]
            for value in values:
                yield name, option.opts[-1], value


@pytest.mark.parametrize(("command", "flag", "value"), list(bad_values()))
def test_a_bad_value_of_any_flag_is_a_usage_error(
    run: Run, command: str, flag: str, value: str
) -> None:
    right = RIGHT[command][:3] if flag.lstrip("-") in WAYS else RIGHT[command]
    result = run(command, *right, flag, value)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[0].startswith("Usage: ")
    if value:
        assert flag in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", RIGHT)
@pytest.mark.parametrize("extra", [["--no-such-flag"], ["one", "two", "-x"], ["\udcff"], [""]])
def test_words_that_no_command_takes_are_a_usage_error(
    run: Run, command: str, extra: list[str]
) -> None:
    result = run(command, *RIGHT[command], *extra)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[0].startswith("Usage: ")
    assert run(command).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compress", NOWHERE, "-o", "out"], "exactly one of --prune, --bits, --plan"),
        (["compress", NOWHERE, "-o", "out", "--bits", "2", "--prune", "0.4"], "exactly one of"),
        (["compress", NOWHERE, "-o", "out", "--plan", "16:0.9"], "--plan"),
        (["compress", NOWHERE, "-o", "out", "--recipe", "none.yaml", "--seed", "1"], "--seed"),
        (["compress", NOWHERE, "-o", "out", "--prune", "0.4", "--solver", "rtn"], "--solver"),
        (["compress", NOWHERE, "-o", "/", "--bits", "2"], "give it a name"),
        (["analyze", NOWHERE, "-o", "/"], "give it a name"),
        (["convert", NOWHERE, "--to", "dense", "-o", "/"], "give it a name"),
        (["verify", NOWHERE, "--calibration", "text.txt"], "--against"),
        (["bench", NOWHERE, "--modes", "latency", "--plot", "out.png"], "--modes serve"),
        (["bench", NOWHERE, "--modes", "speed"], "'speed' is not one of"),
        (["bench", NOWHERE, "-o", "out", "--plot", "./out"], "--plot"),
        (["inspect", ""], "variable"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_flags_that_contradict_each_other_are_a_usage_error(
    run: Run, arguments: list[str], named: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert named in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        *([command, *words] for command, words in RIGHT.items()),
        ["compress", NOWHERE, "-o", "out", "--recipe", "none.yaml"],
        ["compress", NOWHERE, "-o", "out", "--bits", "2", "--device", "cuda"],
        ["bench", NOWHERE, "-o", "none/out.json"],
        ["bench", NOWHERE, "--threads", "100000"],
    ],
)
def test_what_the_files_or_the_machine_refuse_is_an_error_of_one_line(
    run: Run, arguments: list[str]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
