"""Calibration sources -> their documents: files in the forms people have, folders, hub sets."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from camera_serve.errors import CalibrationError, first_line
from camera_serve.recipe import Calibration

HUB_SETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {"path": "allenai/c4", "name": "en", "split": "train", "streaming": True},
}
"""The data sets of the paper (section 4.2), as `datasets.load_dataset` takes them."""

C4_DOCUMENTS_PER_SAMPLE = 32
"""C4 documents are short (about 480 tokens): enough for one 2048-token sample, and to spare."""

READ_AT_ONCE = 1 << 20
"""Bytes of a file in memory, but for a row that is longer."""

LONGEST_ROW = 1 << 26
"""Characters of a row, or bytes of a line: what is longer is no row, and would have to be held."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ACCEPTED = (
    'an object with "text" (a string), or with "messages" or "conversations" (a list of turns), or '
    "a string"
)

Turn = dict[str, Any]
"""A message with its `role`, its `content` (a string, or None where it only calls tools) and what
else the row says of it."""

Chat = Callable[[list[Turn], list[Any] | None], str]
"""Turns, and the tools they may call, as the model's template writes them."""


@dataclass(frozen=True)
class Conversation:
    """A row of chat; the model's template makes a text of it when that is needed.

    where: its file and line.
    """

    turns: list[Turn]
    tools: list[Any] | None
    chat: Chat
    where: str
    size: int

    def __len__(self) -> int:
        """About as many characters as its text will have."""
        return self.size

    def text(self) -> str:
        """What the template writes; raises `CalibrationError` that names the row it refuses."""
        try:
            return _clean(self._written())
        except CalibrationError:
            raise
        except Exception as error:
            # Templates are programs of the model's: they raise what they like.
            raise CalibrationError(
                f"{self.where} is refused by the model's chat template ({first_line(error)}): mend "
                "or remove that row"
            ) from error

    def _written(self) -> str:
        """Some templates know calls by a content of null; others fail on it, or write "None"."""
        if all(turn["content"] is not None for turn in self.turns):
            return self.chat(self.turns, self.tools)
        empty = [{**turn, "content": turn["content"] or ""} for turn in self.turns]
        try:
            found = self.chat(self.turns, self.tools)
        except Exception:
            return self.chat(empty, self.tools)
        if "None" in found:
            with suppress(Exception):
                other = self.chat(empty, self.tools)
                if other.replace("None", "") == found.replace("None", ""):
                    return other
        return found


Piece = str | Conversation
"""Some text, or a chat that is not rendered yet; each has a length."""


@dataclass
class Documents:
    """The text of all sources, one stream of pieces; documents are an empty line apart.

    skipped: rows without text, and files of other kinds in a folder, counted while it is read.
    """

    settings: Calibration
    chat: Chat
    skipped: dict[str, int] = field(default_factory=dict)

    def pieces(self, rendered: int) -> Iterator[Piece]:
        """The text piece by piece: a document may come in many, none of them is kept.

        Chats that begin within the first `rendered` characters come as text.
        """
        length = 0
        for document in self._documents():
            begun = False
            for piece in document:
                if isinstance(piece, Conversation) and length <= rendered:
                    piece = piece.text()
                if not piece:
                    continue
                if not begun and length:
                    length += 2
                    yield "\n\n"
                begun = True
                length += len(piece)
                yield piece
            if not begun:
                self._skip("rows without text")

    def _documents(self) -> Iterator[Iterable[Piece]]:
        for source in self._sources():
            if isinstance(source, str):
                samples = self.settings.samples
                yield from ([text] for text in _hub(source, samples * C4_DOCUMENTS_PER_SAMPLE))
            else:
                yield from self._read(source)

    def _sources(self) -> list[str | Path]:
        """Data sets by name, and all files; raises `CalibrationError` for one given twice."""
        found: dict[str | Path, str | Path] = {}
        for source in self.settings.sources:
            if not source:
                # As a path it would be the folder one is in.
                raise CalibrationError("calibration source '' names nothing: give a file or folder")
            for one in [source] if source in HUB_SETS else self._files(Path(source)):
                known = one.resolve() if isinstance(one, Path) else one
                if known in found:
                    again = f", the second time as {one}" if one != found[known] else ""
                    raise CalibrationError(
                        f"calibration source {found[known]} is given twice{again}: name it once"
                    )
                found[known] = one
        return list(found.values())

    def _files(self, source: Path) -> list[Path]:
        if not source.is_dir():
            if not source.is_file():
                fault = "is no file" if source.exists() else "does not exist"
                raise CalibrationError(
                    f"calibration source {source} {fault}: give {_KINDS}, a folder of such "
                    f"files, or one of the data sets {', '.join(HUB_SETS)}"
                )
            if kind_of(source) is None:
                raise CalibrationError(
                    f"calibration source {str(source)!r} is neither {_KINDS} nor one of the data "
                    f"sets {', '.join(HUB_SETS)}"
                )
            return [source]
        inside = [p for p in sorted(source.rglob("*")) if p.is_file()]
        inside = [p for p in inside if not any(n.startswith(".") for n in _inner(p, source))]
        files = [path for path in inside if kind_of(path)]
        if not files:
            raise CalibrationError(
                f"calibration folder {source} holds no text: put {_KINDS} into it"
            )
        if len(files) < len(inside):
            self._skip("files of other kinds", len(inside) - len(files))
        return files

    def _read(self, file: Path) -> Iterator[Iterable[Piece]]:
        kind = kind_of(file)
        if kind == ".txt":
            yield _text(file)
            return
        rows = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[str(kind)]
        for where, row in rows(file):
            yield [self._row(row, where)]

    def _row(self, row: Any, where: str) -> Piece:
        """What a row holds, empty where it has none; raises `CalibrationError` that names it."""
        if isinstance(row, str):
            return _clean(row)
        if not isinstance(row, dict):
            raise CalibrationError(f"{where}: {_kind_of_value(row)}, wanted {ACCEPTED}")
        if isinstance(row.get("text"), str):
            return _clean(row["text"])
        for name in ("messages", "conversations"):
            if row.get(name) is not None:
                return self._conversation(row[name], row.get("tools"), where, name)
        known = [name for name in ("text", "messages", "conversations") if name in row]
        if not known:
            keys = ", ".join(map(str, list(row)[:6])) or "no keys"
            raise CalibrationError(f"{where}: an object with {keys}, wanted {ACCEPTED}")
        if row.get("text") is not None:
            found = _kind_of_value(row["text"])
            raise CalibrationError(f'{where}: "text" is {found}, wanted a string')
        return ""

    def _conversation(self, turns: Any, tools: Any, where: str, name: str) -> Piece:
        here = f'{where}: "{name}"'
        if not isinstance(turns, list):
            raise CalibrationError(f"{here} is {_kind_of_value(turns)}, wanted a list of turns")
        if not turns:
            return ""
        said = [_turn(turn, f"{here}, turn {n}") for n, turn in enumerate(turns, start=1)]
        called = _tools(tools, where)
        try:
            size = len(repr(said)) + len(repr(called))
        except RecursionError as error:
            raise CalibrationError(f"{here} is nested too deeply: remove that row") from error
        return Conversation(said, called, self.chat, here, size)

    def _skip(self, what: str, count: int = 1) -> None:
        self.skipped[what] = self.skipped.get(what, 0) + count


_KINDS = "a .txt, .jsonl, .json or .parquet file (or one of the first three with .gz)"


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, in lower case and without `.gz`, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    kind = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    readable = (".txt", ".jsonl", ".json") if packed else (".txt", ".jsonl", ".json", ".parquet")
    return kind if kind in readable else None


def _inner(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file's bytes, unpacked; what is wrong with them is said with its name."""
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as content:
            yield content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CalibrationError(f"{file} cannot be read: {reason}") from error


def _decoded(content: IO[bytes], file: Path) -> Iterator[str]:
    """The characters of a file with its line ends as `\\n`, some at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    line, chunk = 1, b"begin"
    while chunk:
        # The decoder keeps a last \r back: it may be half a line end.
        held = b"\r" if chunk.endswith(b"\r") else b""
        chunk = content.read(READ_AT_ONCE)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before, byte = error.object[: error.start], error.object[error.start]
            line += len((held + before + b"x").splitlines()) - 1
            raise CalibrationError(
                f"{file}, line {line}: byte 0x{byte:02x} cannot be read as UTF-8 text: save the "
                "file as UTF-8"
            ) from error
        line += text.count("\n")
        yield text


def _text(file: Path) -> Iterator[str]:
    with _opened(file) as content:
        yield from _decoded(content, file)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _opened(file) as content:
        lines = iter(partial(content.readline, LONGEST_ROW + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if len(line) > LONGEST_ROW:
                raise CalibrationError(f"{where}: longer than {LONGEST_ROW:,} bytes: {_SHORTER}")
            stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if not stripped:
                continue
            try:
                row = json.loads(stripped)
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{where}: not UTF-8 ({first_line(error)})") from error
            except (ValueError, RecursionError) as error:
                raise _not_json(where, error) from error
            yield where, row


_SHORTER = "make several rows of it, or a .txt file"


def _not_json(where: str, error: Exception) -> CalibrationError:
    # Places in the message are those in what was decoded, not in the file.
    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
    return CalibrationError(f"{where}: not JSON ({reason}), wanted {ACCEPTED}")


class _JsonText:
    """JSON whose values are decoded one by one as it is read; `line` is where the next one is."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.line = 1
        self._chunks = chunks
        self._text = ""
        self._at = 0

    def next(self) -> str:
        """The next character that is no space, empty at the end; it stays where it is."""
        while True:
            if found := _NO_SPACE.search(self._text, self._at):
                self._pass(found.start())
                return found[0]
            self._pass(len(self._text))
            if not self._read(1):
                return ""

    def skip(self) -> None:
        """Pass over what `next` has found."""
        self._at += 1

    def value(self, where: str) -> Any:
        """The next value; raises `CalibrationError` that names it as soon as it cannot be one."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not self._goes_on(error) or not self._read_row(where):
                    raise _not_json(where, error) from error
            else:
                # A number, or a word, may go on in the next chunk.
                if end < len(self._text) or not self._read_row(where):
                    self._pass(end)
                    return value

    def _goes_on(self, error: Exception) -> bool:
        """Whether what follows may mend it: an open string, or an end within what is a word."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_WORD

    def _read_row(self, where: str) -> bool:
        """Double what is held of a row, so that no character is decoded many times."""
        held = len(self._text) - self._at
        if held > LONGEST_ROW:
            raise CalibrationError(f"{where}: longer than {LONGEST_ROW:,} characters: {_SHORTER}")
        return self._read(min(held, LONGEST_ROW + 1 - held))

    def _read(self, least: int) -> bool:
        """Read `least` more characters, if there are so many; whether there was any."""
        parts = [self._text[self._at :]]
        while least > 0 and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            least -= len(chunk)
        before, self._text, self._at = len(parts[0]), "".join(parts), 0
        return len(self._text) > before

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end


_DECODER = json.JSONDecoder()
_NO_SPACE = re.compile(r"[^ \t\r\n]")

_LONGEST_WORD = len(r"\ud83d\ude00")
"""Characters at the end of a chunk in which the decoder may see a fault that is none."""


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """The elements of one list, or values one after another, as of JSON lines."""
    with _opened(file) as content:
        text = _JsonText(_decoded(content, file))
        if text.next() == "[":
            yield from _elements(text, file)
        while text.next():
            where = f"{file}, line {text.line}"
            yield where, text.value(where)


def _elements(text: _JsonText, file: Path) -> Iterator[tuple[str, Any]]:
    text.skip()
    number, more = 0, text.next() != "]"
    while more:
        number += 1
        where = f"{file}, element {number}"
        yield where, text.value(where)
        if more := text.next() == ",":
            text.skip()
    if (end := text.next()) != "]":
        fault = f"{end} where a comma or ] is due" if end else "the file ends within the list"
        raise CalibrationError(f"{file}, line {text.line}: not JSON ({fault})")
    text.skip()
    if text.next():
        raise CalibrationError(
            f"{file}, line {text.line}: more after the list: put all rows into one list, or one "
            "row in each line"
        )


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CalibrationError(needs_extra(f"reading {file}")) from error
    wanted = ("text", "messages", "conversations", "tools")
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        if columns in ([], ["tools"]):
            found = ", ".join(table.schema_arrow.names[:6])
            raise CalibrationError(
                f'{file}: columns {found}, wanted "text", "messages" or "conversations"'
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    # A ValueError is a string that is no UTF-8.
    except (ArrowException, OSError, ValueError) as error:
        raise CalibrationError(f"{file}: not a parquet file ({first_line(error)})") from error


def _turn(turn: Any, where: str) -> Turn:
    """A turn of either form (OpenAI's, ShareGPT's) as templates have it."""
    if not isinstance(turn, dict):
        raise CalibrationError(f"{where} is {_kind_of_value(turn)}, {_TURN}")
    # Templates ask whether a key is there: columns of a table hold null for none.
    said = {key: value for key, value in turn.items() if value is not None}
    role, content = said.pop("from", None), said.pop("value", None)
    role, content = said.pop("role", role), said.pop("content", content)
    if isinstance(content, list):
        content = _joined(content, where)
    calls = "tool_calls" in said or "function_call" in said
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        found = [f"{key} ({_kind_of_value(value)})" for key, value in list(turn.items())[:6]]
        raise CalibrationError(f"{where} has {', '.join(found) or 'no keys'}, {_TURN}")
    return {**said, "role": SHAREGPT_ROLES.get(role, role), "content": content}


_TURN = 'wanted an object with "role" and "content" (or "from" and "value") as strings'


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content that comes in parts."""
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise CalibrationError(f"{where} holds something other than text: remove that row")
    return "".join(texts)


def _tools(tools: Any, where: str) -> list[Any] | None:
    """What a chat may call: a list, or one that is written as a string."""
    found = tools
    if isinstance(tools, str) and tools:
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError):
            found = tools
    if found and not isinstance(found, list):
        kind = _kind_of_value(found)
        raise CalibrationError(f'{where}: "tools" is {kind}, wanted a list of functions')
    return found or None


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can spell and no tokenizer takes."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind_of_value(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _hub(name: str, limit: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(needs_extra(f"the data set {name}")) from error
    try:
        rows = datasets.load_dataset(**HUB_SETS[name])
        yield from (row["text"] for row in islice(rows, limit if name == "c4" else None))
    except (OSError, ValueError, ConnectionError) as error:
        reason = first_line(error)
        raise CalibrationError(
            f"data set {name} cannot be loaded from the hub ({reason}): give a local file with "
            "--calibration FILE"
        ) from error


def needs_extra(what: str) -> str:
    """The remedy where an optional package is missing."""
    return (
        f"{what} needs an optional package: pip install 'camera-serve[hub]', or give a local .txt "
        "or .jsonl file with --calibration FILE"
    )
