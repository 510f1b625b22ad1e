"""Calibration text -> token batches: local files, or a hub data set by name."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from camera_serve.errors import CalibrationError, first_line
from camera_serve.recipe import Calibration

HUB_SETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {"path": "allenai/c4", "name": "en", "split": "train", "streaming": True},
}
"""The data sets of the paper (section 4.2), as `datasets.load_dataset` takes them."""

C4_DOCUMENTS_PER_SAMPLE = 32
"""C4 documents are short (about 480 tokens): enough for one 2048-token sample, and to spare."""


def calibration_tokens(settings: Calibration, model: Path) -> torch.Tensor:
    """Token windows `[samples, seq_len]` (int64), drawn without replacement by `settings.seed`.

    The text is tokenized as one stream and cut into consecutive windows. Raises `CalibrationError`
    with the tokens found and needed when there are too few.
    """
    tokenizer = load_tokenizer(model)
    text = "\n\n".join(read_documents(settings))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # Without tokenizer files transformers builds one that knows no word of any text.
    if text.strip() and not ids:
        raise CalibrationError(f"{model} has no tokenizer: put the model's tokenizer files there")
    windows = len(ids) // settings.seq_len
    if windows < settings.samples:
        raise CalibrationError(_too_little(settings, len(ids), windows))
    stream = torch.tensor(ids[: windows * settings.seq_len]).view(windows, settings.seq_len)
    generator = torch.Generator().manual_seed(settings.seed)
    return stream[torch.randperm(windows, generator=generator)[: settings.samples]]


def load_tokenizer(model: Path) -> Any:
    """The model's own tokenizer; raises `CalibrationError` when the folder has none."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise CalibrationError(
            f"{model} has no tokenizer that loads ({reason}): put the model's tokenizer files there"
        ) from error


def read_documents(settings: Calibration) -> Iterable[str]:
    """The documents of a `.txt`, `.jsonl` or `.parquet` file, or of a hub data set by name."""
    if settings.source in HUB_SETS:
        return _hub_documents(settings.source, settings.samples * C4_DOCUMENTS_PER_SAMPLE)
    path = Path(settings.source)
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise CalibrationError(
            f"calibration source {settings.source!r} is neither a {', '.join(readers)} file nor "
            f"one of the data sets {', '.join(HUB_SETS)}"
        )
    if not path.is_file():
        raise CalibrationError(f"calibration file {path} does not exist")
    return readers[path.suffix](path)


def _read_text(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(
                    f'{path}, line {number}: wanted an object with a "text" key ({error})'
                ) from error
            if not isinstance(text, str):
                raise CalibrationError(
                    f'{path}, line {number}: "text" is a {type(text).__name__}, wanted a string'
                )
            yield text


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CalibrationError(_needs_extra(f"reading {path}")) from error
    try:
        column = parquet.read_table(path, columns=["text"])["text"]
        return [str(text) for text in column.to_pylist() if text is not None]
    except (ArrowException, OSError, KeyError) as error:
        raise CalibrationError(f'{path}: wanted parquet with a "text" column ({error})') from error


def _hub_documents(name: str, limit: int) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(_needs_extra(f"the data set {name}")) from error
    try:
        rows = datasets.load_dataset(**HUB_SETS[name])
        return [row["text"] for row in islice(rows, limit if name == "c4" else None)]
    except (OSError, ValueError, ConnectionError) as error:
        reason = first_line(error)
        raise CalibrationError(
            f"data set {name} cannot be loaded from the hub ({reason}): give a local file with "
            "--calibration FILE"
        ) from error


def _needs_extra(what: str) -> str:
    return (
        f"{what} needs an optional package: pip install 'camera-serve[hub]', or give a local .txt "
        "or .jsonl file with --calibration FILE"
    )


def _too_little(settings: Calibration, found: int, windows: int) -> str:
    needed = settings.samples * settings.seq_len
    fewer = f"use --samples {windows} or fewer, or " if windows else ""
    return (
        f"calibration text {settings.source!r} holds {found:,} tokens; {settings.samples} samples "
        f"of {settings.seq_len} need {needed:,}: give more text, or {fewer}use a shorter "
        "--seq-len"
    )
