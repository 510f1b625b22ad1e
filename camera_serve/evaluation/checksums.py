"""Are a checkpoint's files, to the byte, those that `compress` or `convert` wrote?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from camera_serve.checkpoint.files import ABOUT_WEIGHTS, CODE, WEIGHTS, files_like
from camera_serve.checkpoint.reader import Checkpoint, read_conversion
from camera_serve.checkpoint.report import CONVERSION_FILE, REPORT_FILE
from camera_serve.checkpoint.writer import sha256_of, side_files_of
from camera_serve.errors import CheckpointError
from camera_serve.evaluation.inspection import report_of


@dataclass(frozen=True)
class Checksums:
    """SHA-256 by file name, as camera_report.json or camera_conversion.json has them.

    weights: of the safetensors files; side_files: of what engines read beside them, such as
    config.json and the tokenizer. Empty where an older version wrote none. command: that wrote
    them; noted_in: the file they are from.
    """

    folder: Path
    command: str
    noted_in: str
    weights: Mapping[str, str]
    side_files: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The checksums beside a checkpoint.

        Raises `CheckpointError` when one is missing, of a file of weights or of code, whatever its
        format, or of another file that is there for engines to read: it was added later, or the
        report was edited.
        """
        converted = None if checkpoint.quantization else read_conversion(checkpoint.path)
        noted_by = converted or report_of(checkpoint)
        command, noted_in = "compress", REPORT_FILE
        if converted:
            command, noted_in = "convert", CONVERSION_FILE
        noted = noted_by.sha256 if noted_by else {}
        weights = {name: noted[name] for name in noted if name.endswith(".safetensors")}
        side_files = {name: noted[name] for name in noted if name not in weights}
        patterns = (*WEIGHTS, *ABOUT_WEIGHTS, *CODE) if side_files else WEIGHTS
        found = set(map(str, files_like(checkpoint.path, patterns))) if noted else set()
        found |= set(side_files_of(checkpoint.path)) if side_files else set()
        if unknown := sorted(found - noted.keys()):
            raise CheckpointError(
                f"{checkpoint.path / unknown[0]} is no file that {command} wrote: {noted_in} has "
                f"checksums of {len(noted)} others; remove it, or copy {noted_in} again"
            )
        return cls(checkpoint.path, command, noted_in, weights, side_files)

    @property
    def remedy(self) -> str:
        """What to do about a file that is another now."""
        return f"copy the file again, or {self.command} again"

    @property
    def num_bytes(self) -> int:
        """Bytes that `check_side_files` and `check_weights` read."""
        files = [self.folder / name for name in (*self.weights, *self.side_files)]
        return sum(file.stat().st_size for file in files if file.exists())

    def check_side_files(self, hashed: Callable[[int], None]) -> None:
        """Raise `CheckpointError` for the first side file that is another now, or gone.

        hashed: is told the bytes of each part that is done.
        """
        for name, wanted in self.side_files.items():
            self._check(name, wanted, self.remedy, hashed)

    def check_weights(self, hashed: Callable[[int], None], hint: str) -> None:
        """The same for weights."""
        for name, wanted in self.weights.items():
            self._check(name, wanted, f"{self.remedy}; {hint}", hashed)

    def verdict(self, file: Path) -> str:
        """What is known of a file of weights with a wrong tensor in it, as the end of a message."""
        wanted = self.weights.get(file.name)
        if wanted is None:
            return ""
        if sha256_of(file) == wanted:
            return f"; {file.name} is as {self.command} wrote it: give the model it was made from"
        return f"; {file.name} is not the file that {self.command} wrote: {self.remedy}"

    def _check(self, name: str, wanted: str, remedy: str, hashed: Callable[[int], None]) -> None:
        file = self.folder / name
        try:
            found = sha256_of(file, hashed)
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}), and {self.noted_in} lists it: {remedy}"
            ) from error
        if found != wanted:
            raise CheckpointError(
                f"{file} is not the file that {self.command} wrote: its SHA-256 is {found}, and "
                f"{wanted} in {self.noted_in}: {remedy}"
            )
