"""`OUT.partial`: where a compression works, and what lets it resume after a kill.

A layer is committed when its activations are renamed into place: the shard and the layer's result
are on disk by then. A run killed before that redoes the layer, to the same bytes.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from camera_serve.checkpoint.reader import read_json
from camera_serve.checkpoint.report import REPORT_FILE
from camera_serve.checkpoint.writer import publish, write_json, write_shard
from camera_serve.errors import OutputError

Fingerprint = Mapping[str, str]
"""What decides the bytes of the output, each part by name: a run resumes only its own."""


class Workspace:
    """The folder a run writes to before it is renamed to `output`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.state = self.path / ".state"
        self._hidden = self.state / "hidden.safetensors"

    def start(self, fingerprint: Fingerprint, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, or take up an interrupted run of the same fingerprint.

        Raises `OutputError` when the output exists, or an interrupted run differs.
        """
        check_output(self.output, overwrite=overwrite)
        begun = (self.state / "fingerprint.json").exists()
        if begun and resume:
            self._compare(fingerprint)
            return
        if begun and not overwrite:
            raise OutputError(
                f"{self.path} holds an interrupted run: continue it with --resume, or start over "
                "with --overwrite"
            )
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.state.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be created: {error.strerror}") from error
        write_json(self.state / "fingerprint.json", dict(fingerprint))

    def commit(self, layer: int, result: Mapping[str, object], hidden: torch.Tensor) -> None:
        """Record a finished layer: its result, then the activations that enter the next one."""
        write_json(self._result(layer), dict(result))
        write_shard(self._hidden, {"hidden": hidden}, {"next_layer": str(layer + 1)})

    @property
    def bytes_written(self) -> int:
        """What an earlier run of this output already takes on the disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def resume_point(self) -> tuple[int, torch.Tensor | None]:
        """The next layer to compress and its input; (0, None) when nothing is committed."""
        if not self._hidden.exists():
            return 0, None
        with safe_open(self._hidden, framework="pt") as handle:
            return int(handle.metadata()["next_layer"]), handle.get_tensor("hidden")

    def results(self, num_layers: int) -> list[dict[str, object]]:
        """The results of all layers, in order."""
        return [read_json(self._result(layer)) for layer in range(num_layers)]

    def discard(self) -> None:
        """Delete the folder: the run cannot be continued."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Rename the folder to its final name; the state is dropped after that."""
        publish(self.path, self.output)
        shutil.rmtree(self.output / ".state", ignore_errors=True)

    def _result(self, layer: int) -> Path:
        return self.state / f"layer-{layer:05}.json"

    def _compare(self, fingerprint: Fingerprint) -> None:
        found = read_json(self.state / "fingerprint.json")
        if changed := differences(found, fingerprint):
            raise OutputError(
                f"{self.path} was begun by another run: {changed}; use the same settings, or "
                "--overwrite to start over"
            )


def differences(found: Fingerprint, wanted: Fingerprint) -> str:
    """What two fingerprints disagree on, as `part: found X, now Y`; empty when they agree."""
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key}: found {found.get(key)}, now {wanted.get(key)}" for key in keys)


def refuse_overlap(source: Path, output: Path) -> None:
    """Refuse an output inside the model's folder, or around it."""
    inside = output.resolve().is_relative_to(source.resolve())
    if inside or source.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"output {output} and model {source} overlap: write somewhere else")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an existing output, and with `overwrite` one that camera-serve did not write."""
    if not output.name:
        raise OutputError(f"{output} cannot be an output folder: give it a name")
    if not output.exists():
        return
    if not overwrite:
        raise OutputError(f"{output} exists: choose another name, or replace it with --overwrite")
    ours = (output / REPORT_FILE).exists() or (output / "camera_analysis.json").exists()
    if not ours and any(output.iterdir() if output.is_dir() else [output]):
        raise OutputError(f"{output} was not written by camera-serve: it will not be overwritten")
