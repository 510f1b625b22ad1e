"""Typed errors. Every message says what was found, what was wanted, and what to do."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

TRANSFORMERS_TESTED = ("5.13.0", "5.24.0")
"""The oldest and the newest transformers that the tests run with."""

LONGEST_REASON = 300
"""Characters of another library's message: some print the whole of what they refuse."""


class CameraError(Exception):
    """Base of every error camera-serve raises for a user's mistake or a bad input."""


class UnsupportedModelError(CameraError):
    """The architecture, or one of its settings, is not one camera-serve understands."""


class RecipeError(CameraError):
    """A setting of the compression is out of range or contradicts another."""


class CalibrationError(CameraError):
    """The calibration text cannot be read or holds too few tokens."""


class AnalysisError(CameraError):
    """An analysis is damaged, has no survey, or was made from other inputs."""


class CheckpointError(CameraError):
    """A checkpoint is missing files or tensors, or its tensors contradict its config."""


class DamagedWeightsError(CheckpointError):
    """A weight is NaN or Inf, or a scale is not positive, or a layer cannot be run, or only to NaN.

    Trying again gives the same.
    """


class OutputError(CameraError):
    """The output folder cannot be written: it exists, its disk is full, or another run owns it."""


class ServingError(CameraError):
    """vLLM was started in a version or with a setting that cannot serve the checkpoint."""


class LibraryError(CameraError, ImportError):
    """An installed library is of a version that camera-serve does not fit."""

    @classmethod
    def of_transformers(cls, reason: object) -> "LibraryError":
        """What is said of a transformers that lacks something, or calls ours in another way."""
        return cls(
            f"transformers {version('transformers')} does not fit this camera-serve: {reason}; "
            f"install {TRANSFORMERS_TESTED[0]} to {TRANSFORMERS_TESTED[1]}, with which it was "
            "tested, or a newer camera-serve"
        )


class KernelError(CameraError):
    """A kernel was given weights or activations it cannot take."""


class KernelBuildError(CameraError):
    """The CPU kernel could not be compiled on this machine."""


def is_missing_from_transformers(error: ImportError) -> bool:
    """Whether a name was looked for inside transformers, which is installed but another version."""
    return (error.name or "").startswith("transformers.")


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the error's kind when it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def described(error: BaseException) -> str:
    """Another library's error in one line, its kind first: `KeyError: 'yarnx'` is no sentence."""
    first, *more = str(error).splitlines() or [""]
    # Below "Validation error for field 'x':" stand kind and reason; below others, stack frames.
    text = more[0] if more and first.endswith(":") else f"{type(error).__name__}: {first}"
    return text.strip()[:LONGEST_REASON]


def quoted(path: object) -> str:
    """A path as a word of a command that somebody will copy into a shell."""
    word = str(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has its own kinds of it, both RuntimeErrors."""
    names = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in names or "can't allocate memory" in str(error)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Put the file first in the message of a `CameraError` that is raised inside."""
    try:
        yield
    except CameraError as error:
        raise type(error)(f"{file}: {error}") from error
