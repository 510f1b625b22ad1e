"""Calibration text -> token windows, drawn with the same chance from every part of it."""

import logging
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from camera_serve.calibration.documents import Documents
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CalibrationError, described
from camera_serve.recipe import Calibration

logger = logging.getLogger(__name__)

WHOLE = 1_500_000
"""Characters that are tokenized as one text: a tokenizer takes some 200 bytes for each."""

CHARACTERS_PER_TOKEN = (8, 64, 512)
"""Text that has more characters a token than the first is drawn in longer pieces."""

PIECES_PER_WINDOW = 2
"""Drawn, because some may hold too few tokens."""


@dataclass(frozen=True)
class CalibrationWindows:
    """What a model is run on.

    tokens: int64 `[samples, seq_len]`; skipped: how many rows or files were left out, by why.
    """

    tokens: torch.Tensor
    skipped: Mapping[str, int]


def windows_for(checkpoint: Checkpoint, settings: Calibration) -> CalibrationWindows:
    """The calibration windows of a model; raises `CalibrationError` for what it cannot take."""
    _check_positions(checkpoint, settings)
    windows = calibration_windows(settings, checkpoint.path)
    _check_vocabulary(checkpoint, windows.tokens)
    for what, count in windows.skipped.items():
        logger.info("calibration text: skipped %d %s", count, what)
    return windows


def calibration_windows(settings: Calibration, model: Path) -> CalibrationWindows:
    """Windows of a text under the tokenizer at `model`, without replacement by `settings.seed`.

    A text of up to `WHOLE` characters is tokenized as one stream and cut into consecutive windows.
    Of a longer one that holds far more than is needed, pieces are drawn, and a window in each: what
    is not drawn is read and not tokenized. Raises `CalibrationError` with the tokens found and
    needed when there are too few.
    """
    tokenizer = _Tokenizer(model)
    for ratio in CHARACTERS_PER_TOKEN:
        documents = Documents(settings, tokenizer.render)
        text, more = _beginning(documents.pieces(), max(WHOLE, _enough(settings, ratio)))
        if more is None:
            tokens = _consecutive(settings, tokenizer, text)
            break
        drawn = _draw(settings, chain(text, more), ratio * settings.seq_len)
        if (found := _one_of_each(settings, tokenizer, drawn)) is not None:
            tokens = found
            break
    else:
        raise CalibrationError(
            f"calibration text {settings.name!r} holds fewer than {settings.seq_len} tokens in "
            f"{ratio * settings.seq_len:,} characters: give other text, or a shorter --seq-len"
        )
    return CalibrationWindows(tokens, documents.skipped)


def _enough(settings: Calibration, ratio: int) -> int:
    """Characters below which drawing would tokenize nearly all of the text."""
    return 2 * PIECES_PER_WINDOW * ratio * settings.num_tokens


def _beginning(pieces: Iterator[str], limit: int) -> tuple[list[str], Iterator[str] | None]:
    """The text as far as `limit` characters, and what comes after them, None if nothing does."""
    text: list[str] = []
    length = 0
    for piece in pieces:
        if length + len(piece) > limit:
            return text, chain([piece], pieces)
        text.append(piece)
        length += len(piece)
    return text, None


def _consecutive(settings: Calibration, tokenizer: "_Tokenizer", text: list[str]) -> torch.Tensor:
    """Some of the consecutive windows of a text, all of which is tokenized."""
    ids = array("q")
    for part in _parts(text):
        ids.extend(tokenizer.ids(part))
    windows = len(ids) // settings.seq_len
    if windows < settings.samples:
        raise CalibrationError(_too_little(settings, len(ids), windows))
    kept = torch.tensor(ids[: windows * settings.seq_len]).view(windows, settings.seq_len)
    generator = torch.Generator().manual_seed(settings.seed)
    return kept[torch.randperm(windows, generator=generator)[: settings.samples]]


def _parts(text: list[str]) -> Iterator[str]:
    """A text as parts of at most some `WHOLE` characters, cut after a space where there is one."""
    joined = "".join(text)
    start = 0
    while len(joined) - start > WHOLE:
        end = start + WHOLE
        cut = max(joined.rfind(space, start + WHOLE // 2, end) for space in "\n ") + 1
        yield joined[start : cut or end]
        start = cut or end
    yield joined[start:]


def _draw(settings: Calibration, text: Iterable[str], length: int) -> list[str]:
    """Pieces of about `length` characters, every one with the same chance, in random order.

    Reservoir sampling (Vitter's algorithm R): no more pieces are held than are drawn.
    """
    generator = random.Random(settings.seed)
    wanted = PIECES_PER_WINDOW * settings.samples
    drawn: list[str] = []
    for number, piece in enumerate(_cut(text, length)):
        if number < wanted:
            drawn.append(piece)
        elif (place := generator.randrange(number + 1)) < wanted:
            drawn[place] = piece
    generator.shuffle(drawn)
    return drawn


def _cut(text: Iterable[str], length: int) -> Iterator[str]:
    """Consecutive pieces of `length` characters, the last one longer by what is left."""
    buffer = ""
    for piece in text:
        buffer += piece
        if len(buffer) < 2 * length:
            continue
        last = len(buffer) // length * length - length
        for start in range(0, last, length):
            yield buffer[start : start + length]
        buffer = buffer[last:]
    if buffer:
        yield buffer


def _one_of_each(
    settings: Calibration, tokenizer: "_Tokenizer", drawn: list[str]
) -> torch.Tensor | None:
    """A window somewhere in each piece, None where too few pieces hold one."""
    generator = random.Random(settings.seed)
    windows: list[list[int]] = []
    for piece in drawn:
        ids = tokenizer.ids(piece)
        if len(ids) >= settings.seq_len:
            start = generator.randrange(len(ids) - settings.seq_len + 1)
            windows.append(ids[start : start + settings.seq_len])
        if len(windows) == settings.samples:
            return torch.tensor(windows)
    return None


class _Tokenizer:
    """The model's own tokenizer and chat template."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._tokenizer = load_tokenizer(model)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin or end one."""
        with _refusing_damage(self._model):
            found = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # Without tokenizer files transformers builds one that knows no word of any text.
        if text.strip() and not found:
            raise CalibrationError(
                f"{self._model} has no tokenizer: put the model's tokenizer files there"
            )
        return list(found)

    def render(self, messages: list[dict[str, str]], row: Mapping[str, Any]) -> str:
        """A chat as the model's template writes it."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{self._model} has no chat template for rows of chat: give rows with "
                '"text", or put the model\'s chat_template.jinja there'
            )
        rendered = self._tokenizer.apply_chat_template(
            messages, tools=row.get("tools") or None, tokenize=False
        )
        return str(rendered)


def load_tokenizer(model: Path) -> Any:
    """The model's own tokenizer; raises `CalibrationError` when the folder has none."""
    with _refusing_damage(model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


@contextmanager
def _refusing_damage(model: Path) -> Iterator[None]:
    """Turn whatever a damaged tokenizer file makes of the code inside into one error."""
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CalibrationError(
            f"{model} has no tokenizer that loads ({described(error)}): put the model's tokenizer "
            "files there"
        ) from error


def _check_positions(checkpoint: Checkpoint, settings: Calibration) -> None:
    config = checkpoint.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most and settings.seq_len > (most := max(most, _scaled_positions(config))):
        raise CalibrationError(
            f"windows of {settings.seq_len} tokens are longer than the {most} positions of "
            f"{checkpoint.path}: use --seq-len {most} or less"
        )


def _scaled_positions(config: Any) -> int:
    """Positions that a scaled rotary embedding reaches, where the config says so."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return 0
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    numbers = (int, float)
    if isinstance(factor, numbers) and isinstance(original, numbers):
        return int(factor * original)
    return 0


def _check_vocabulary(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    rows, _ = checkpoint.entries[checkpoint.structure.embedding_name].shape
    if (highest := int(tokens.max())) >= rows:
        raise CalibrationError(
            f"the tokenizer of {checkpoint.path} gives token {highest}, and the model has {rows}: "
            "its tokenizer files belong to another model; put its own there"
        )


def _too_little(settings: Calibration, found: int, windows: int) -> str:
    needed = settings.samples * settings.seq_len
    fewer = f"use --samples {windows} or fewer, or " if windows else ""
    return (
        f"calibration text {settings.name!r} holds {found:,} tokens; {settings.samples} samples "
        f"of {settings.seq_len} need {needed:,}: give more text, or {fewer}use a shorter "
        "--seq-len"
    )
