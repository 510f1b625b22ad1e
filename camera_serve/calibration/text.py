"""Calibration text -> token windows, each of which had the same chance to be drawn."""

import logging
import math
import random
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from camera_serve.calibration.documents import Documents, Piece, Turn
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CalibrationError, described
from camera_serve.recipe import Calibration

logger = logging.getLogger(__name__)

WHOLE = 1_500_000
"""Characters that are tokenized as one text: a tokenizer takes some 200 bytes for each."""

CHARACTERS_PER_TOKEN = (8, 64, 512)
"""Text that has more characters a token than the first is drawn in longer blocks."""

AROUND_A_WINDOW = 2
"""A window's own part of the text may have that many times the characters a token."""

LEAST_BLOCKS = 256
"""Blocks that are drawn at least: of few, those with many tokens would take chances from others."""

BLOCKS_PER_WINDOW = 2
"""Drawn, so that windows which begin in them need not overlap."""

SHORTEST_BLOCK = 512
"""Characters: the text is gone through block by block."""

Block = tuple[Piece, ...]
"""Consecutive pieces of the text, the unit that is drawn: all of it lies in exactly one block."""


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
    In a longer one every window has the same chance, wherever it begins: where far more is there
    than is needed, blocks of the text are drawn, and windows that begin in them; what is not drawn
    is read and not tokenized, and its chats are not rendered. Raises `CalibrationError` with the
    tokens found and needed when there are too few.
    """
    tokenizer = _Tokenizer(model)
    for ratio in CHARACTERS_PER_TOKEN:
        documents, plan = Documents(settings, tokenizer.render), _Plan.of(settings, ratio)
        limit = max(WHOLE, plan.enough)
        text, more = _beginning(documents.pieces(limit), limit)
        if more is None:
            tokens = _of_whole(settings, tokenizer, "".join(text))
            break
        chance = random.Random(settings.seed)
        drawn = _draw(_blocks(chain(text, more), plan.length), plan, chance)
        if (found := _of_blocks(settings, tokenizer, drawn, plan, chance)) is not None:
            tokens = found
            break
    else:
        raise CalibrationError(
            f"calibration text {settings.name!r} has more than {ratio:,} characters for each "
            f"token, too many to draw {settings.samples} windows of {settings.seq_len} tokens "
            "from: give other text, or a shorter --seq-len"
        )
    return CalibrationWindows(tokens, documents.skipped)


@dataclass(frozen=True)
class _Plan:
    """How a text is drawn from whose tokens have up to some number of characters.

    length: characters of a block; blocks: how many are drawn; reach: how many after each a window
    that begins in it may need.
    """

    length: int
    blocks: int
    reach: int

    @classmethod
    def of(cls, settings: Calibration, ratio: int) -> "_Plan":
        blocks = max(LEAST_BLOCKS, BLOCKS_PER_WINDOW * settings.samples)
        length = max(SHORTEST_BLOCK, ratio * settings.num_tokens // blocks)
        return cls(length, blocks, math.ceil(AROUND_A_WINDOW * ratio * settings.seq_len / length))

    @property
    def enough(self) -> int:
        """Characters below which drawing would tokenize nearly all of the text."""
        return 2 * self.blocks * self.length


def _beginning(pieces: Iterator[Piece], limit: int) -> tuple[list[str], Iterator[Piece] | None]:
    """The text as far as `limit` characters, and what comes after them, None if nothing does."""
    text: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > limit or not isinstance(piece, str):
            return text, chain([piece], pieces)
        text.append(piece)
    return text, None


def _of_whole(settings: Calibration, tokenizer: "_Tokenizer", text: str) -> torch.Tensor:
    """Some of the windows of a text, all of which is tokenized."""
    ids = tokenizer.ids(text)
    windows = len(ids) // settings.seq_len
    if windows < settings.samples:
        raise CalibrationError(_too_little(settings, len(ids), windows))
    if len(text) <= WHOLE:
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(windows, generator=generator)[: settings.samples]
        starts = (settings.seq_len * order).tolist()
    else:
        starts = _starts(len(ids) - settings.seq_len + 1, settings, random.Random(settings.seed))
    return torch.tensor([ids[start : start + settings.seq_len].tolist() for start in starts])


def _starts(count: int, settings: Calibration, chance: random.Random) -> list[int]:
    """`samples` of `count` places, each with the same chance, `seq_len` or more apart.

    They lie on a grid: a first place is as likely as there are places on its grid, and each of
    those is then as likely as the others. Empty where `count` leaves no room for them.
    """
    last = count - 1 - (settings.samples - 1) * settings.seq_len
    firsts = range(min(last + 1, settings.seq_len))
    if not firsts:
        return []
    grids = [range(first, count, settings.seq_len) for first in firsts]
    (grid,) = chance.choices(grids, [len(grid) for grid in grids])
    return chance.sample(grid, settings.samples)


def _parts(text: str) -> Iterator[str]:
    """A text as parts of at most some `WHOLE` characters, cut after a space where there is one."""
    start = 0
    while len(text) - start > WHOLE:
        end = start + WHOLE
        cut = max(text.rfind(space, start + WHOLE // 2, end) for space in "\n ") + 1
        yield text[start : cut or end]
        start = cut or end
    yield text[start:]


def _blocks(pieces: Iterable[Piece], length: int) -> Iterator[Block]:
    """The text as blocks of some `length` characters, the same however its pieces are cut.

    A chat is not cut: a block that holds some may be longer.
    """
    held: list[Piece] = []
    size, text = 0, ""
    for piece in pieces:
        if isinstance(piece, str):
            *full, text = _cut(text + piece, length)
            for block in full:
                yield (*held, block)
                held, size = [], 0
        else:
            held += [text, piece]
            size, text = size + len(text) + len(piece), ""
            if size >= length:
                yield tuple(held)
                held, size = [], 0
    if held or text:
        yield (*held, text)


def _cut(text: str, length: int) -> list[str]:
    """Parts of some `length` characters, each ended before a space if one is near, and the rest."""
    parts: list[str] = []
    start = 0
    while len(text) - start > length:
        end = start + length
        space = max(text.rfind(space, end - length // 16, end) for space in "\n ")
        parts.append(text[start : space if space > 0 else end])
        start += len(parts[-1])
    return [*parts, text[start:]]


def _draw(blocks: Iterable[Block], plan: _Plan, chance: random.Random) -> list[list[Block]]:
    """Blocks that had the same chance, in their order, each with what follows within its reach.

    Reservoir sampling (Vitter's algorithm R): little more is held than is drawn.
    """
    drawn: list[tuple[int, list[Block]]] = []
    growing: deque[list[Block]] = deque()
    for number, block in enumerate(blocks):
        for stretch in growing:
            stretch.append(block)
        while growing and len(growing[0]) > plan.reach:
            growing.popleft()
        place = number if number < plan.blocks else chance.randrange(number + 1)
        if place < plan.blocks:
            growing.append([block])
            drawn[place : place + 1] = [(number, growing[-1])]
    return [stretch for _, stretch in sorted(drawn, key=itemgetter(0))]


def _of_blocks(
    settings: Calibration,
    tokenizer: "_Tokenizer",
    drawn: list[list[Block]],
    plan: _Plan,
    chance: random.Random,
) -> torch.Tensor | None:
    """Windows that begin in drawn blocks, None where they hold too few tokens.

    Each token of each block is as likely to begin one, but for those too near the text's end.
    """
    seq_len, counts = settings.seq_len, []
    for stretch in drawn:
        counts.append(len(tokenizer.ids(_text(stretch[:1]))))
        if len(stretch) <= plan.reach:
            left = len(tokenizer.ids(_text(stretch)))
            counts[-1] = max(0, min(counts[-1], left - seq_len + 1))
    ends = list(accumulate(counts))
    windows: list[list[int]] = []
    for start in _starts(ends[-1], settings, chance):
        place = bisect_right(ends, start)
        first = start - ends[place] + counts[place]
        ids = _ids_until(first + seq_len, tokenizer, drawn[place], counts[place])
        windows.append(ids[first : first + seq_len].tolist())
    if not windows or min(map(len, windows)) < seq_len:
        return None
    return torch.tensor(windows)


def _ids_until(
    end: int, tokenizer: "_Tokenizer", stretch: list[Block], of_first: int
) -> "array[int]":
    """`end` tokens of consecutive blocks or more, or all there are; the first block's are known."""
    taken = math.ceil(end / of_first)
    while True:
        ids = tokenizer.ids(_text(stretch[:taken]))
        if len(ids) >= end or taken >= len(stretch):
            return ids
        taken *= 2


def _text(blocks: Iterable[Block]) -> str:
    return "".join(
        piece if isinstance(piece, str) else piece.text() for block in blocks for piece in block
    )


class _Tokenizer:
    """The model's own tokenizer and chat template."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._tokenizer = load_tokenizer(model)

    def ids(self, text: str) -> "array[int]":
        """The tokens of a text, int64, without those that begin or end one."""
        ids = array("q")
        for part in _parts(text):
            ids.extend(self._ids(part))
        return ids

    def _ids(self, text: str) -> list[int]:
        with _refusing_damage(self._model):
            found = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # Without tokenizer files transformers builds one that knows no word of any text.
        if text.strip() and not found:
            raise CalibrationError(
                f"{self._model} has no tokenizer: put the model's tokenizer files there"
            )
        return list(found)

    def render(self, turns: list[Turn], tools: list[Any] | None) -> str:
        """A chat as the model's template writes it."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{self._model} has no chat template for rows of chat: give rows with "
                '"text", or put the model\'s chat_template.jinja there'
            )
        return str(self._tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))


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
    most = max_positions(checkpoint.config.get_text_config())
    if most and settings.seq_len > most:
        raise CalibrationError(
            f"windows of {settings.seq_len} tokens are longer than the {most} positions of "
            f"{checkpoint.path}: use --seq-len {most} or less"
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest window a model is made for; None where its config does not say.

    Scaled rotary positions reach `factor` times those the model was trained on, which are
    `max_position_embeddings` itself where no others are named.
    """
    stated = getattr(config, "max_position_embeddings", None)
    if not stated or not isinstance(stated, int):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return stated
    # Models with several kinds of attention have one for each.
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    return max(stated, *(_scaled_positions(kind, stated) for kind in kinds))


def _scaled_positions(rope: Mapping[str, Any], stated: int) -> int:
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or stated
    if rope.get("rope_type", rope.get("type")) == "default":
        return stated
    if not isinstance(factor, int | float) or not isinstance(original, int | float):
        return stated
    return int(factor * original) if math.isfinite(factor * original) else stated


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
