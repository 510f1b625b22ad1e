"""What decides the bytes of a compressed checkpoint, each part under its own name."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import torch

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.recipe import Calibration, Recipe

FORMAT = "2"
"""Changes whenever a part gets another meaning: only records of one format can be compared."""

BLOCK = 4096
"""Bytes read at one place of a tensor."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*")
"""What a tokenizer of the supported families is made of."""

_FILE, _RECIPE, _TOKENS = "file ", "recipe.", "calibration tokens"
_CALIBRATION = f"{_RECIPE}calibration."
_WAY_BACK = {
    "device": "--device {}",
    "dtype": "--dtype {}",
    "threads": "set OMP_NUM_THREADS={}",
    "torch": "pip install torch=={}",
    "transformers": "pip install transformers=={}",
    "camera-serve": "pip install camera-serve=={}",
}


def fingerprint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Identify a run by its inputs, so that it resumes only its own work.

    The inputs count by what they hold, not by where they lie or how old they are: config and
    tokenizer files and the tokens of the calibration text as a whole, files of weights by samples.
    Tokens that are not known yet are left out.
    """
    return _inputs(checkpoint, _settings(recipe), tokens, device, dtype)


def fingerprint_of_survey(
    checkpoint: Checkpoint,
    calibration: Calibration,
    tokens: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Identify what a survey finds by its inputs: those of a run that no recipe decides."""
    return _inputs(checkpoint, _windows(calibration), tokens, device, dtype)


def part_of_survey(run: Mapping[str, str]) -> dict[str, str]:
    """Of a run's fingerprint what `fingerprint_of_survey` has."""
    return {
        part: found
        for part, found in run.items()
        if part.startswith(_CALIBRATION) or not part.startswith(_RECIPE)
    }


def _inputs(
    checkpoint: Checkpoint,
    settings: Mapping[str, str],
    tokens: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, str]:
    # On a GPU they decide nothing.
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {
        "format": FORMAT,
        **_model_files(checkpoint),
        **settings,
        **({} if tokens is None else {_TOKENS: _hex(hashlib.sha256(tokens.numpy().tobytes()))}),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        **threads,
        **{package: version(package) for package in ("torch", "transformers", "camera-serve")},
    }


def explain(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Where two fingerprints differ, each with the way back to `found`; empty: nowhere.

    It goes on a sentence such as "OUT was made".
    """
    if found.get("format") != wanted["format"]:
        return "by another version of camera-serve, and its inputs cannot be compared"
    changed = [part for part in {**wanted, **found} if found.get(part) != wanted.get(part)]
    files = [part.removeprefix(_FILE) for part in changed if part.startswith(_FILE)]
    said = [_about_files(files)] if files else []
    if "device" in changed and "threads" in changed:
        # Only one of the devices has them.
        changed.remove("threads")
    for part in changed:
        if part == _TOKENS and not any(map(_decides_tokens, changed)):
            said.append("the calibration text gives other tokens: use the text of that run")
        elif part != _TOKENS and not part.startswith(_FILE):
            said.append(_about_value(part, found.get(part, "unset"), wanted.get(part, "unset")))
    return f"from other inputs: {'; '.join(said)}" if said else ""


def weights_digest(file: Path) -> str:
    """A safetensors file by its size, its header, and blocks of every tensor.

    Reads the header and at most 16 blocks of each tensor, two of most, at places that its name
    and size fix. A tensor that differs throughout is seen for sure, one that differs in a part of
    its bytes about twice as likely as that part is large; a few rows, or a flipped bit, are not.
    """
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        length = handle.read(8)
        header = handle.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(b"%d" % size + length + header)
        data = len(length) + len(header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for place, count in _samples(name, end - start):
                    digest.update(os.pread(handle.fileno(), count, data + start + place))
    return _hex(digest)


def _samples(name: str, size: int) -> Iterator[tuple[int, int]]:
    """Where in a tensor to read, and how many bytes: all of a small one, else spread blocks."""
    blocks = min(16, 2 + size // 2**24)
    if size <= blocks * BLOCK:
        yield 0, size
        return
    for block in range(blocks):
        # Not at the same rows of every expert: an edit may have spared just those.
        shift = zlib.crc32(f"{name} {block}".encode()) / 2**32
        yield int((block + shift) / blocks * (size - BLOCK)), BLOCK


def _model_files(checkpoint: Checkpoint) -> dict[str, str]:
    weights = sorted(checkpoint.weight_files)
    # A network's file system answers many small reads at once as fast as one.
    with ThreadPoolExecutor(max_workers=16) as pool:
        digests = dict(zip(weights, pool.map(weights_digest, weights), strict=True))
    for file in checkpoint.path.iterdir():
        if file.is_file() and (file.name == "config.json" or _of_tokenizer(file.name)):
            digests[file] = _hex(hashlib.sha256(file.read_bytes()))
    return {f"{_FILE}{file.name}": digests[file] for file in sorted(digests)}


def _settings(recipe: Recipe) -> dict[str, str]:
    """The recipe without the place of the calibration text: its tokens count."""
    # Without `keep_fp8` where it is not asked for: older runs have recorded none.
    parts = recipe.model_dump(mode="json") | {"plan": recipe.goal}
    del parts["calibration"]
    settings = {f"{_RECIPE}{key}": str(value) for key, value in parts.items()}
    return settings | _windows(recipe.calibration)


def _windows(calibration: Calibration) -> dict[str, str]:
    """How the calibration text is drawn from."""
    parts = calibration.model_dump(mode="json", exclude={"source"})
    return {f"{_CALIBRATION}{key}": str(value) for key, value in parts.items()}


def _of_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def _decides_tokens(part: str) -> bool:
    return part.startswith(_CALIBRATION) or _of_tokenizer(part.removeprefix(_FILE))


def _about_files(names: list[str]) -> str:
    differ = f"file {names[0]} of the model differs"
    if len(names) > 1:
        differ = f"{len(names)} files of the model differ, {names[0]} among them"
    return f"{differ}: use the model of that run"


def _about_value(part: str, found: str, wanted: str) -> str:
    way_back = _WAY_BACK.get(part)
    hint = f" ({way_back.format(found)})" if way_back else ""
    return f"{part.removeprefix(_RECIPE)}: then {found}, now {wanted}{hint}"


def _hex(digest: "hashlib._Hash") -> str:
    return digest.hexdigest()[:16]
