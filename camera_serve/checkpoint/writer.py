"""Writing a checkpoint: shards, index, config and side files, every file by rename."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from camera_serve.checkpoint.files import INDEX, side_files
from camera_serve.checkpoint.format import NO_PLAIN_TRANSFORMERS, CameraQuantizationConfig
from camera_serve.checkpoint.reader import QUANTIZATION_KEYS, Checkpoint, read_json
from camera_serve.checkpoint.report import CONVERSION_FILE, REPORT_FILE
from camera_serve.errors import OutputError

logger = logging.getLogger(__name__)

STATE = ".state"
"""The folder inside a working folder that is dropped when the output is complete."""

READ_BY_ENGINES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of tokenizers, chat templates and settings."""

BYTES_AT_ONCE = 2**24
"""Of a file that is hashed."""


class ShardPlan:
    """Which shard holds which tensor: one shard for what is outside the layers, one per layer.

    `shards[i]` are the names of shard i; the decoder layer l is shard `l + 1`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        layers: dict[int, list[str]] = {}
        for name in sorted(checkpoint.entries):
            if not is_left_behind(name):
                layer = checkpoint.structure.layer_number(name)
                layers.setdefault(-1 if layer is None else layer, []).append(name)
        inside = range(-1, checkpoint.structure.num_layers)
        past_the_end = sorted(layer for layer in layers if layer not in inside)
        self.shards = [layers.get(layer, []) for layer in (*inside, *past_the_end)]

    def file_name(self, shard: int) -> str:
        """`model-00003-of-00049.safetensors`, the name every engine knows."""
        return f"model-{shard + 1:05}-of-{len(self.shards):05}.safetensors"


def is_left_behind(name: str) -> bool:
    """Whether a tensor of the original is in no output: a table that every engine makes itself."""
    return name.endswith("rotary_emb.inv_freq")


def write_shard(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file; it appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        # safetensors writes for the owner alone; a server may run as another user.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def sha256_of(path: Path, hashed: Callable[[int], None] = lambda num_bytes: None) -> str:
    """A file's SHA-256 in hexadecimal; `hashed` is told the bytes of each part once it is done."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(BYTES_AT_ONCE):
            digest.update(part)
            hashed(len(part))
    return digest.hexdigest()


def side_files_of(folder: Path) -> list[str]:
    """Names of what engines may read beside weights: config.json, tokenizer, chat template."""
    own = (file.name for file in folder.iterdir() if file.is_file())
    names = {*map(str, side_files(folder)), *own} - {REPORT_FILE, CONVERSION_FILE}
    return sorted(name for name in names if Path(name).suffix in READ_BY_ENGINES)


def write_text(path: Path, text: str) -> None:
    """Write one text file; it appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, keys in the order given."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """The safetensors index: `files` maps each shard's file name to its tensor names."""
    weight_map = {name: file for file, names in files.items() for name in names}
    data = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX, data)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: `side_files`, as real files."""
    for file in side_files(source):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        settings = _settings_with_code(source / file)
        if settings:
            # The code it names is in no copy.
            _warn_of_tokenizer(source, settings)
            write_json(target / file, _without(settings, ("auto_map",)))
        else:
            shutil.copyfile(source / file, target / file)


def _warn_of_tokenizer(source: Path, settings: Mapping[str, Any]) -> None:
    """Say where a tokenizer is code, and transformers makes one of its vocabulary alone."""
    own_code = "AutoTokenizer" in (settings.get("auto_map") or ())
    if own_code and not (source / "tokenizer.json").is_file():
        logger.warning(
            "%s has a tokenizer of its own code, which is not carried over: transformers reads its "
            "vocabulary, and may cut some text otherwise (Kimi-K2: Chinese). To serve with the "
            "original's: vllm serve OUT --tokenizer %s --trust-remote-code",
            source,
            source,
        )


def serving_config(
    checkpoint: Checkpoint, quantization: CameraQuantizationConfig | None
) -> dict[str, Any]:
    """config.json of the written model: the original's own text, plus what a compressed one says.

    Remote code is dropped (camera-serve brings what it needs), the architecture gets the name
    serving engines know, and settings they do not assume are spelled out.
    """
    family, key = checkpoint.structure.family, _text_key(checkpoint.config)
    config = _of_the_original(checkpoint.raw_config)
    spelled_out = family.settings_spelled_out(checkpoint.config.get_text_config())
    if key is None:
        config = spelled_out | config
    else:
        config[key] = spelled_out | _of_the_original(config.get(key) or {})
        if quantization:
            # transformers may load the text part alone, by its own settings.
            config[key]["transformers_weights"] = NO_PLAIN_TRANSFORMERS
    config["architectures"] = [family.architectures[0]]
    return config | (quantization.config_entries() if quantization else {})


def _text_key(config: PreTrainedConfig) -> str | None:
    """The key under which config.json describes the text part; None where all of it does."""
    text = config.get_text_config()
    return next((key for key, part in vars(config).items() if part is text), None)


def _of_the_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """The original's settings, without code of its own and without how it stores weights."""
    return _without(config, ("auto_map", "transformers_weights", *QUANTIZATION_KEYS))


def free_bytes(folder: Path) -> int:
    """Free disk space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Raise `OutputError` when the disk under `folder` has less than `needed` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"{folder} needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: free "
            "some, or write to another disk"
        )


def publish(partial: Path, output: Path) -> None:
    """Rename a finished folder to its final name, replacing an older one there.

    The older one is moved into `partial` first, where a kill between the renames leaves both.
    """
    replaced = partial / STATE / "replaced"
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        if replaced.exists():
            replaced.rename(output)
        raise
    _sync(output.parent)
    shutil.rmtree(output / STATE, ignore_errors=True)


def _settings_with_code(file: Path) -> dict[str, Any] | None:
    """The settings in a file if they name code of the model's own."""
    if not file.name.endswith("_config.json") or b'"auto_map"' not in file.read_bytes():
        return None
    return read_json(file)


def _without(settings: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A JSON object without some keys, at any depth."""
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in keys
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
