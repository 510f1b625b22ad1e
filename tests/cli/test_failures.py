"""The error handler: what users see, and with which exit code."""

import errno
import subprocess
import sys
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner, Result

from camera_serve.cli import main
from camera_serve.cli.failures import FriendlyGroup
from camera_serve.errors import CheckpointError


def _fail_with(error: BaseException, name: str = "work") -> Result:
    @click.group(cls=FriendlyGroup)
    def group() -> None:
        pass

    @group.command(name)
    def work() -> None:
        raise error

    return CliRunner().invoke(group, [name])


def test_a_known_error_is_one_paragraph_on_stderr() -> None:
    result = _fail_with(CheckpointError("first line\n  second line"))
    assert result.exit_code == 1
    assert result.stderr == "error: first line second line\n"
    assert result.stdout == ""


def test_a_name_that_is_not_utf_8_is_refused_before_any_work() -> None:
    for word in ("\udcff", "--out=\udce9"):
        result = CliRunner().invoke(main, ["inspect", word])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == (
            f"Error: {word!a} is not UTF-8: rename it, as checkpoints and engines want"
        )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied"),
        (MemoryError(), "error: out of memory"),
        (
            ImportError("cannot import name 'x'", name="transformers.core"),
            f"error: transformers {version('transformers')} does not fit this camera-serve: cannot",
        ),
    ],
)
def test_a_failure_of_the_machine_is_told_without_a_traceback(
    error: BaseException, message: str
) -> None:
    result = _fail_with(error)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)


def test_an_interrupt_exits_with_130_and_compress_can_go_on() -> None:
    compress, other = _fail_with(KeyboardInterrupt(), "compress"), _fail_with(KeyboardInterrupt())
    assert compress.exit_code == other.exit_code == 130
    assert "--resume" in compress.stderr
    assert "--resume" not in other.stderr


def test_a_defect_of_the_program_is_not_hidden() -> None:
    for error in (ZeroDivisionError(), ModuleNotFoundError("no yaml", name="yaml")):
        assert _fail_with(error).exception is error


def test_help_loads_no_library_that_takes_seconds() -> None:
    code = (
        "import sys; from camera_serve.cli import main\n"
        "try: main(['compress', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
