"""`OUT.partial`: where a run works before its output appears, and what lets it resume after a kill.

A layer is committed when its activations are renamed into place: the shard and the layer's result
are on disk by then. A run killed before that redoes the layer, to the same bytes.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from camera_serve.checkpoint.lock import now, sole_writer
from camera_serve.checkpoint.reader import read_json
from camera_serve.checkpoint.report import REPORT_FILE
from camera_serve.checkpoint.writer import STATE, publish, write_json, write_shard
from camera_serve.errors import CheckpointError, OutputError

Fingerprint = Mapping[str, str]
"""What decides the bytes of the output, each part by name: a run resumes only its own."""


@dataclass(frozen=True)
class Begun:
    """An interrupted run of compress: since when, and on what; "" for what is not recorded."""

    since: str
    fingerprint: Fingerprint


class Workspace:
    """The folder a run writes to before it is renamed to `output`. One run holds it at a time."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = working_folder(output)
        self.state = self.path / STATE
        self._begun = self.state / "fingerprint.json"
        self._hidden = self.state / "hidden.safetensors"
        self._surveyed = self.state / "surveyed.safetensors"

    def create(self, *, overwrite: bool = False) -> None:
        """Make the folder anew, in place of what a killed run left.

        Raises `OutputError` when it holds an interrupted run of compress, unless `overwrite`, or
        when camera-serve did not make it.
        """
        if self._begun.exists() and not overwrite:
            raise OutputError(
                f"{self.path} holds an interrupted run of compress: continue it with compress "
                "--resume, start it over with compress --overwrite, or choose another output"
            )
        if self.path.exists() and not self.state.is_dir() and not _is_empty(self.path):
            raise OutputError(
                f"{self.path} was not begun by camera-serve: move it away, or choose another output"
            )
        self.discard()
        try:
            self.state.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be created: {error.strerror}") from error

    def record(self, fingerprint: Fingerprint) -> None:
        """Let a later run resume from here on, if its fingerprint is the same."""
        write_json(self._begun, {"since": now(), "fingerprint": dict(fingerprint)})

    def begun(self) -> Begun | None:
        """The interrupted run this folder holds, if any."""
        if not self._begun.exists():
            return None
        found = read_json(self._begun)
        # An older version wrote the fingerprint alone, of parts that mean nothing here.
        return Begun(str(found.get("since", "")), dict(found.get("fingerprint", {})))

    @contextmanager
    def kept_for_resuming(self) -> Iterator[None]:
        """Leave the folder when the body fails, but for one without a finished layer."""
        try:
            yield
        except BaseException:
            if not (self._hidden.exists() or self._surveyed.exists()):
                self.discard()
            raise

    def commit(self, layer: int, result: Mapping[str, object], hidden: torch.Tensor) -> None:
        """Record a finished layer: its result, then the activations that enter the next one."""
        write_json(self._result(layer), dict(result))
        _enter(self._hidden, layer + 1, hidden)

    def commit_survey(
        self, layer: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor
    ) -> None:
        """Record what the survey has found in a layer, then what enters the next one."""
        write_shard(self._survey(layer), tensors)
        _enter(self._surveyed, layer + 1, hidden)

    def take_survey(
        self, layers: Mapping[int, Mapping[str, torch.Tensor]], num_layers: int
    ) -> None:
        """Record what a survey of all `num_layers` has found elsewhere."""
        for layer, tensors in layers.items():
            write_shard(self._survey(layer), tensors)
        _enter(self._surveyed, num_layers, torch.empty(0))

    @property
    def bytes_written(self) -> int:
        """What an earlier run of this output already takes on the disk."""
        files = (*self.path.glob("*"), *self.state.glob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())

    def resume_point(self) -> tuple[int, torch.Tensor | None]:
        """The next layer to compress and its input; (0, None) when nothing is committed."""
        return _next_layer(self._hidden)

    def survey_point(self) -> tuple[int, torch.Tensor | None]:
        """The next layer to survey and its input; (0, None) when nothing is committed."""
        return _next_layer(self._surveyed)

    @property
    def layers_surveyed(self) -> int:
        """How many layers are surveyed, from the first on."""
        return _layer_entered(self._surveyed) if self._surveyed.exists() else 0

    def survey(self, layer: int) -> dict[str, torch.Tensor]:
        """What the survey has found in a layer."""
        return load_file(self._survey(layer))

    def results(self, num_layers: int) -> list[dict[str, object]]:
        """The results of all layers, in order."""
        return [read_json(self._result(layer)) for layer in range(num_layers)]

    def discard(self) -> None:
        """Delete the folder: the run cannot be continued.

        Killed meanwhile, it leaves a folder that nobody resumes, and that is known as ours.
        """
        self._begun.unlink(missing_ok=True)
        for entry in self.path.glob("*"):
            if entry.is_dir() and entry != self.state:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != self.state:
                entry.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, *, overwrite: bool | None) -> None:
        """Rename the folder to its final name, if nobody else has taken that meanwhile."""
        check_output(self.output, overwrite=overwrite)
        publish(self.path, self.output)

    def _result(self, layer: int) -> Path:
        return self.state / f"layer-{layer:05}.json"

    def _survey(self, layer: int) -> Path:
        return self.state / f"survey-{layer:05}.safetensors"


def _enter(file: Path, layer: int, hidden: torch.Tensor) -> None:
    """Record what enters a layer, as `_next_layer` reads it."""
    write_shard(file, {"hidden": hidden}, {"next_layer": str(layer)})


def _layer_entered(file: Path) -> int:
    """The layer that the activations in a file enter."""
    with safe_open(file, framework="pt") as handle:
        return int(handle.metadata()["next_layer"])


def _next_layer(file: Path) -> tuple[int, torch.Tensor | None]:
    if not file.exists():
        return 0, None
    with safe_open(file, framework="pt") as handle:
        # A copy: the file's pages would be held, in memory and on the disk, while it is used.
        return _layer_entered(file), handle.get_tensor("hidden").clone()


def working_folder(output: Path) -> Path:
    """Where a run works on `output`."""
    return output.with_name(output.name + ".partial")


def refuse_overlap(source: Path, output: Path) -> None:
    """Refuse an output, or its working folder, inside the model's folder or around it."""
    model, output = source.resolve(), output.resolve()
    for folder in (output, working_folder(output) if output.name else output):
        if folder.is_relative_to(model) or model.is_relative_to(folder):
            raise OutputError(f"output {folder} and model {source} overlap: write somewhere else")


def check_output(output: Path, *, overwrite: bool | None) -> None:
    """Refuse an existing output, and with `overwrite` one that camera-serve did not write.

    None is for commands that never overwrite.
    """
    if not output.name:
        raise OutputError(f"{output} cannot be an output folder: give it a name")
    if not output.exists():
        return
    if not overwrite:
        or_replace = "" if overwrite is None else ", or replace it with --overwrite"
        raise OutputError(f"{output} exists: choose another name{or_replace}")
    ours = (output / REPORT_FILE).exists() or (output / "camera_analysis.json").exists()
    if not ours and any(output.iterdir() if output.is_dir() else [output]):
        raise OutputError(f"{output} was not written by camera-serve: it will not be overwritten")


@contextmanager
def whole_output(output: Path, command: str, *, overwrite: bool | None = None) -> Iterator[Path]:
    """An empty folder that becomes `output` when the body ends, and is deleted when it fails.

    Raises `OutputError` when `output` exists (see `check_output`), another run writes it or has
    begun it, or it cannot be written.
    """
    with sole_writer(output, command):
        check_output(output, overwrite=overwrite)
        workspace = Workspace(output)
        workspace.create()
        try:
            yield workspace.path
            workspace.publish(overwrite=overwrite)
        except OSError as error:
            raise OutputError(f"{output} cannot be written: {error.strerror or error}") from error
        finally:
            workspace.discard()


def folder_identity(folder: Path) -> tuple[int, int]:
    """What stays the same while the folder is the same one, whatever its name."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def require_same_folder(source: Path, identity: tuple[int, int]) -> None:
    """Refuse what was read from `source` when another run has put a new folder in its place.

    Files are opened one after the other: some would be of the old folder, some of the new one.
    """
    if folder_identity(source) != identity:
        raise CheckpointError(f"{source} was replaced while it was read: run the command again")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
