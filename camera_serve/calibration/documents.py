"""Calibration sources -> their documents: files in the forms people have, folders, hub sets."""

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ACCEPTED = (
    'an object with "text" (a string), or with "messages" or "conversations" (a list of turns), or '
    "a string"
)

Chat = Callable[[list[dict[str, str]], Mapping[str, Any]], str]
"""Turns, each with `role` and `content`, and their whole row, as the model's template has them."""


@dataclass
class Documents:
    """The text of all sources, one stream of pieces; documents are an empty line apart.

    skipped: rows without text, and files of other kinds in a folder, counted while it is read.
    """

    settings: Calibration
    chat: Chat
    skipped: dict[str, int] = field(default_factory=dict)

    def pieces(self) -> Iterator[str]:
        """The text piece by piece: a document may come in many, none of them is kept."""
        first = True
        for document in self._documents():
            begun = False
            for piece in document:
                if not piece:
                    continue
                if not begun and not first:
                    yield "\n\n"
                begun, first = True, False
                yield piece
            if not begun:
                self._skip("rows without text")

    def _documents(self) -> Iterator[Iterable[str]]:
        for source in self.settings.sources:
            if source in HUB_SETS:
                samples = self.settings.samples
                yield from ([text] for text in _hub(source, samples * C4_DOCUMENTS_PER_SAMPLE))
                continue
            for file in self._files(Path(source)):
                yield from self._read(file)

    def _files(self, source: Path) -> list[Path]:
        if not source.is_dir():
            if not source.is_file():
                raise CalibrationError(
                    f"calibration source {source} does not exist: give {_KINDS}, a folder of such "
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
            raise CalibrationError(f"calibration folder {source} holds no {_KINDS}")
        if len(files) < len(inside):
            self._skip("files of other kinds", len(inside) - len(files))
        return files

    def _read(self, file: Path) -> Iterator[Iterable[str]]:
        kind = kind_of(file)
        if kind == ".txt":
            yield _text(file)
            return
        rows = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}[str(kind)]
        for where, row in rows(file):
            yield [self._row(row, where)]

    def _row(self, row: Any, where: str) -> str:
        """The text of a row, empty where it has none; raises `CalibrationError` that names it."""
        if isinstance(row, str):
            return _clean(row)
        if not isinstance(row, dict):
            raise CalibrationError(f"{where}: {_kind_of_value(row)}, wanted {ACCEPTED}")
        if isinstance(row.get("text"), str):
            return _clean(row["text"])
        for name in ("messages", "conversations"):
            if row.get(name) is not None:
                return self._chat(row[name], row, f'{where}: "{name}"')
        known = [name for name in ("text", "messages", "conversations") if name in row]
        if not known:
            keys = ", ".join(map(str, list(row)[:6])) or "no keys"
            raise CalibrationError(f"{where}: an object with {keys}, wanted {ACCEPTED}")
        if row.get("text") is not None:
            found = _kind_of_value(row["text"])
            raise CalibrationError(f'{where}: "text" is {found}, wanted a string')
        return ""

    def _chat(self, turns: Any, row: Mapping[str, Any], where: str) -> str:
        if not isinstance(turns, list):
            raise CalibrationError(f"{where} is {_kind_of_value(turns)}, wanted a list of turns")
        if not turns:
            return ""
        try:
            messages = [_message(turn) for turn in turns]
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f'{where} has a turn without "role" and "content" (or "from" and "value") as '
                "strings"
            ) from error
        try:
            return _clean(self.chat(messages, row))
        except CalibrationError:
            raise
        except Exception as error:
            # Templates are programs of the model's: they raise what they like.
            raise CalibrationError(
                f"{where} is refused by the model's chat template ({first_line(error)}): mend or "
                "remove that row"
            ) from error

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
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} cannot be read as UTF-8 text: {error}") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CalibrationError(f"{file} cannot be read: {reason}") from error


def _decoded(content: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := content.read(READ_AT_ONCE):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _text(file: Path) -> Iterator[str]:
    with _opened(file) as content:
        yield from _decoded(content)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _opened(file) as content:
        for number, line in enumerate(content, start=1):
            stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if not stripped:
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(stripped)
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{where}: not UTF-8 ({first_line(error)})") from error
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{where}: not JSON ({first_line(error)}), wanted {ACCEPTED}"
                ) from error
            yield where, row


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    """The elements of one list, decoded one by one as the file is read."""
    decoder = json.JSONDecoder()
    with _opened(file) as content:
        chunks = _decoded(content)
        buffer, number = next(chunks, "").lstrip(), 0
        if not buffer.startswith("["):
            raise CalibrationError(f"{file}: wanted a list ([...]) of rows, each {ACCEPTED}")
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            where = f"{file}, element {number + 1}"
            try:
                row, end = decoder.raw_decode(buffer)
                # A number, or a word, may go on in the next chunk.
                if end == len(buffer):
                    raise ValueError("unfinished")
            except (ValueError, RecursionError) as error:
                more = next(chunks, None)
                if more is None or isinstance(error, RecursionError):
                    reason = first_line(error)
                    raise CalibrationError(
                        f"{where}: not JSON ({reason}), wanted {ACCEPTED}"
                    ) from error
                buffer += more
                continue
            number += 1
            buffer = buffer[end:]
            yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CalibrationError(needs_extra(f"reading {file}")) from error
    wanted = ("text", "messages", "conversations")
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        if not columns:
            found = ", ".join(table.schema_arrow.names[:6])
            raise CalibrationError(
                f'{file}: columns {found}, wanted "text", "messages" or "conversations"'
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{file}: not a parquet file ({first_line(error)})") from error


def _message(turn: Any) -> dict[str, str]:
    """A turn of either form (OpenAI's, ShareGPT's) as `role` and `content`."""
    role = turn["role"] if "role" in turn else turn["from"]
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError
    return {"role": SHAREGPT_ROLES.get(role, role), "content": content}


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
