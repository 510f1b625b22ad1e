"""The one place where a user's mistake becomes a line on stderr and an exit code.

2, with Click's usage line: the command line is wrong, whatever the files and the machine. 1: they
are not as it takes them to be. 130: interrupted.
"""

import errno
import sys
from typing import IO, Any

import click

from camera_serve.errors import (
    CameraError,
    LibraryError,
    is_missing_from_transformers,
    is_out_of_memory,
)


class Failure(click.ClickException):
    """Shown as `error: …` in one paragraph; ends the command with its exit code."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the message to stderr."""
        click.echo(f"error: {self.message}", file=file or sys.stderr)


class Interrupted(Failure):
    """The user stopped the command."""

    exit_code = 130


class FriendlyGroup(click.Group):
    """A group that shows a known failure of any subcommand without a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split the command line; raises `UsageError` for a word that names nothing."""
        for word in args:
            if word.encode(errors="ignore").decode() != word:
                raise click.UsageError(
                    f"{word!a} is not UTF-8: rename it, as checkpoints and engines want", ctx
                )
        ours = args[: args.index("--")] if "--" in args else args
        if "" in ours:
            raise click.UsageError("An argument is empty: is a shell variable unset?", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; raises `Failure` where it raised something a user can act on."""
        try:
            return super().invoke(ctx)
        except CameraError as error:
            raise Failure(str(error)) from error
        except ImportError as error:
            if not is_missing_from_transformers(error):
                raise
            raise Failure(str(LibraryError.of_transformers(error))) from error
        except KeyboardInterrupt as error:
            raise Interrupted(_how_to_go_on(ctx.invoked_subcommand)) from error
        except OSError as error:
            # A closed pipe (`inspect OUT | head`) is no failure, and click ends it quietly.
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{where}{error.strerror or error}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise Failure("out of memory: use fewer --samples or a shorter --seq-len") from error


def _how_to_go_on(command: str | None) -> str:
    if command == "compress":
        return (
            "interrupted: finished layers, if any, are kept beside the output folder; run the same "
            "command with --resume to go on, or with --overwrite to start again"
        )
    return "interrupted: nothing was changed; run the same command again"
