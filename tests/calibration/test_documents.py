"""Calibration files as people have them: read to the character, or refused by file and line."""

import gzip
import io
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from camera_serve.calibration import documents
from camera_serve.calibration.documents import Documents
from camera_serve.errors import CalibrationError
from camera_serve.recipe import Calibration

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": "three é 😀"}]
TEXT = "one\n\ntwo\nlines\n\nthree é 😀"


def no_chat(messages: Any, tools: Any) -> str:
    raise AssertionError("there is no chat")


def read(*sources: Path, chat: Any = no_chat, rendered: int = 1 << 30) -> str:
    found = Documents(Calibration(source=tuple(map(str, sources))), chat)
    pieces = found.pieces(rendered)
    return "".join(piece if isinstance(piece, str) else piece.text() for piece in pieces)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def lines(rows: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


@pytest.fixture(params=[1, 2, 3, 13, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(documents, "READ_AT_ONCE", request.param)
    return int(request.param)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("\ufefffirst é\r\nsecond\rthird\n", "first é\nsecond\nthird\n"),
        ("\r\n\r\r\n😀\r", "\n\n\n😀\n"),
        ("no line end", "no line end"),
    ],
)
def test_line_ends_of_a_text_are_newlines_wherever_a_chunk_ends(
    tmp_path: Path, chunk: int, content: str, wanted: str, packed: str
) -> None:
    assert read(write(tmp_path / f"a.txt{packed}", content)) == wanted


JSON_FORMS: dict[str, Callable[[list[Any]], str]] = {
    "a list": json.dumps,
    "an indented list": lambda rows: "\n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
    "a packed list": lambda rows: json.dumps(rows, separators=(",", ":")),
    "lines": lines,
    "lines without a last newline": lambda rows: lines(rows).rstrip(),
    "lines of Windows": lambda rows: lines(rows, end="\r\n"),
    "blank lines": lambda rows: "\n \n" + lines(rows, end="\n\n"),
    "a byte order mark": lambda rows: "\ufeff" + lines(rows),
    "strings": lambda rows: lines([row["text"] for row in rows]),
    "objects over several lines": lambda rows: "\n".join(json.dumps(r, indent=1) for r in rows),
    "numbers beside the text": lambda rows: json.dumps(
        [{"id": 12345.5e3, "ok": True, **row, "none": None, "score": -17} for row in rows]
    ),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_rows_in_a_json_file_are_read_in_every_form(
    tmp_path: Path, chunk: int, form: str, packed: str
) -> None:
    file = write(tmp_path / f"a.json{packed}", JSON_FORMS[form](ROWS))
    assert read(file) == TEXT


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "bytes in a text": ("a.txt", b"fine\nfine\n\xc3\xa9 \xe9 no\n", r"a\.txt, line 3: .*0xe9"),
    "bytes after old line ends": ("a.txt", b"fine\rfine\r\n\xff", r"a\.txt, line 3: .*0xff"),
    "half a character": ("a.txt", b"a\nb\xe2\x82", r"a\.txt, line 2: .*0xe2"),
    "bytes in a list": ("a.json", b'["a",\n"\xff"]', r"a\.json, line 2: .*0xff"),
    "bytes in lines": ("a.jsonl", b'"a"\n\n"\xff"', r"a\.jsonl, line 3: not UTF-8"),
    "a row of a list": ("a.json", '["a",\n7]', r"a\.json, element 2: a number, wanted"),
    "a row of lines": ("a.json", '"a"\n\n7', r"a\.json, line 3: a number, wanted"),
    "an object of something": ("a.json", '{"data": ["a"]}', r"line 1: an object with data, wanted"),
    "a comma too few": ("a.json", '["a"\n"b"]', r'a\.json, line 2: not JSON \(" where a comma'),
    "a comma too many": ("a.json", '["a",, "b"]', r"element 2: not JSON"),
    "a trailing comma": ("a.json", '["a",]', r"element 2: not JSON"),
    "a list that ends early": ("a.json", '["a", "b"', r"line 1: not JSON \(the file ends"),
    "more than a list": ("a.json", '["a"]\n["b"]', r"a\.json, line 2: more after the list"),
    "a comma between lines": ("a.json", '"a",\n"b"', r"a\.json, line 1: not JSON"),
    "a bad row of lines": ("a.json", lines(ROWS) + '{"text": nil}', r"a\.json, line 4: not JSON"),
    "a cut row of lines": ("a.json", lines(ROWS) + '{"text": "x', r"a\.json, line 4: not JSON"),
    "no JSON at all": ("a.json", "nonsense", r"a\.json, line 1: not JSON"),
    "deep nesting": ("a.json", "[" + '{"a":' * 100_000, r"element 1: not JSON \(maximum rec"),
    "a long number": ("a.json", "[" + "1" * 5000 + "]", r"element 1: not JSON \(Exceeds the limit"),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_by_file_and_line(
    tmp_path: Path, chunk: int, case: str, packed: str
) -> None:
    name, content, message = REFUSED[case]
    with pytest.raises(CalibrationError, match=message.replace(name[1:], name[1:] + packed)):
        read(write(tmp_path / (name + packed), content))


def damages(data: bytes) -> Iterator[bytes]:
    """A packed file cut off at every byte, and with every byte changed in turn."""
    for at in range(len(data)):
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_whatever_is_wrong_with_a_packed_file_it_is_named(tmp_path: Path, name: str) -> None:
    file, content = tmp_path / name, random.Random(0).randbytes(40).hex()
    for data in damages(gzip.compress(json.dumps([content]).encode())):
        file.write_bytes(data)
        # Names and times in its head may change: then it is read as before.
        try:
            assert content in read(file)
        except CalibrationError as error:
            assert str(file) in str(error)
        except AssertionError:
            # Nothing at all, as in a file of no bytes.
            assert read(file) == ""


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    taken = 0

    def readinto(self, buffer: Any) -> int:
        found = super().readinto(buffer) or 0
        Counted.taken += found
        return found


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Counted.taken = 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Counted(self)))
        yield


@pytest.mark.parametrize(
    "bad", ['{"text" "x"}', "nil", '{"text": "x",}', '{"a": [1 2]}', '"\\q"', "{1: 2}", '"a\nb"']
)
@pytest.mark.parametrize("form", ["[%s, %s", "%s\n%s"])
def test_a_malformed_row_is_refused_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, form: str
) -> None:
    monkeypatch.setattr(documents, "READ_AT_ONCE", 1000)
    file = write(tmp_path / "a.json", form % (bad, '"good", ' * 100_000))
    with counting(monkeypatch), pytest.raises(CalibrationError, match="not JSON"):
        read(file)
    assert Counted.taken <= 20_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("row", ['"%s"', '{"text": "%s"}', '["%s"'])
def test_a_row_longer_than_the_limit_is_refused_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: str
) -> None:
    monkeypatch.setattr(documents, "LONGEST_ROW", 100_000)
    monkeypatch.setattr(documents, "READ_AT_ONCE", 10_000)
    if not row.startswith("["):
        good = write(tmp_path / f"good{name[1:]}", '"a"\n' + row % ("x" * 90_000))
        assert "x" * 90_000 in read(good)
    bad = write(tmp_path / name, '"a"\n' + row % ("1" * 20_000_000))
    tracemalloc.start()
    with pytest.raises(CalibrationError, match=r"line 2: .*longer than 100,000 (bytes|char)"):
        read(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize(("row", "chunk"), [(20, 1 << 22), (1 << 22, 1000)])
def test_the_time_to_read_a_list_grows_with_its_length_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, chunk: int
) -> None:
    """Many rows in one chunk, and one row in many: neither is gone over again and again."""
    monkeypatch.setattr(documents, "READ_AT_ONCE", chunk)
    seconds = []
    for size in (250_000, 4_000_000):
        text = "x" * min(row, size)
        file = write(tmp_path / f"{size}.json", json.dumps([text] * (size // len(text))))
        taken = []
        for _ in range(3):
            begun = time.process_time()
            assert len(read(file)) >= size
            taken.append(time.process_time() - begun)
        seconds.append(min(taken))
    # Sixteen times the length; the square of that would be 256.
    assert seconds[1] <= 64 * seconds[0], seconds


def same_file(folder: Path) -> list[tuple[Path, ...]]:
    (folder / "inner").mkdir()
    file = write(folder / "inner" / "a.txt", "text")
    (folder / "link.txt").symlink_to(file)
    (folder / "again").symlink_to(folder / "inner")
    other = folder / "inner" / ".." / "inner" / "a.txt"
    return [
        (file, file),
        (file, folder / "link.txt"),
        (file, other),
        (folder / "inner", file),
        (folder / "inner", folder / "again"),
        (folder,),
    ]


@pytest.mark.parametrize("case", range(6))
def test_a_file_given_twice_is_refused_before_any_is_read(tmp_path: Path, case: int) -> None:
    sources = same_file(tmp_path)[case]
    with pytest.raises(CalibrationError, match=r"a\.txt.* twice"):
        read(*sources)


def test_a_data_set_given_twice_is_refused() -> None:
    settings = Calibration(source=("wikitext2", "wikitext2"))
    with pytest.raises(CalibrationError, match="wikitext2 is given twice"):
        list(Documents(settings, no_chat).pieces(1))


@pytest.mark.parametrize(("name", "fault"), [("", "'' names nothing"), ("pipe", "is no file")])
def test_what_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    write(tmp_path / "a.txt", "text")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=fault):
        list(Documents(Calibration(source=name), no_chat).pieces(1))


def test_a_source_that_is_missing_is_said_before_any_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "text")
    found = Documents(Calibration(source=(str(file), str(tmp_path / "b.txt"))), no_chat)
    with pytest.raises(CalibrationError, match=r"b\.txt does not exist"):
        next(found.pieces(1))


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "add", "content": "4"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "easy"},
]


def recorder(seen: list[Any]) -> Callable[[Any, Any], str]:
    def chat(messages: Any, tools: Any) -> str:
        seen.append((messages, tools))
        return "rendered"

    return chat


@pytest.mark.parametrize("change", ["null", "left out", "null keys", "parts"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "a string"])
def test_calls_and_tools_reach_the_template_as_they_are(
    tmp_path: Path, change: str, tools: Any
) -> None:
    turns = [dict(turn) for turn in CHAT]
    if change == "left out":
        del turns[1]["content"]
    if change == "null keys":
        turns = [{"name": None, "tool_calls": None, **turn} for turn in turns]
    if change == "parts":
        turns[0]["content"] = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]
    seen: list[Any] = []
    row = {"messages": turns, "tools": tools}
    file = write(tmp_path / "a.jsonl", lines([row]))
    assert read(file, chat=recorder(seen)) == "rendered"
    assert seen == [(CHAT, TOOLS)]


def test_null_is_empty_for_a_template_that_has_no_word_for_it(tmp_path: Path) -> None:
    def joining(messages: Any, tools: Any) -> str:
        return "|".join(m["role"] + ":" + m["content"] for m in messages)

    def printing(messages: Any, tools: Any) -> str:
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    def knowing(messages: Any, tools: Any) -> str:
        return "|".join("call" if m["content"] is None else m["content"] for m in messages)

    file = write(tmp_path / "a.jsonl", lines([{"messages": CHAT}]))
    assert read(file, chat=joining) == "user:2 + 2?|assistant:|tool:4|assistant:Four."
    assert read(file, chat=printing) == "user:2 + 2?|assistant:|tool:4|assistant:Four."
    assert read(file, chat=knowing) == "2 + 2?|call|4|Four."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "tool", "content": None}]}, r"turn 1 has .* content \(null\), w"),
        ({"messages": [CHAT[0], {"role": "user"}]}, r"turn 2 has role \(a string\), wanted"),
        ({"messages": [{"content": "x"}]}, r"turn 1 has content \(a string\), wanted"),
        ({"messages": [{"role": 3, "content": "x"}]}, r"turn 1 has role \(a number\)"),
        ({"messages": [{}]}, "turn 1 has no keys, wanted"),
        ({"messages": ["x"]}, "turn 1 is a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 "),
        ({"messages": CHAT, "tools": "no JSON"}, '"tools" is a string'),
        ({"messages": CHAT, "tools": {"a": 1}}, '"tools" is an object'),
    ],
)
def test_a_chat_of_another_form_is_refused_by_its_turn(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "a.jsonl", lines([{"text": "x"}, row]))
    with pytest.raises(CalibrationError, match=f"line 2.*{message}"):
        read(file, chat=recorder([]))


def test_parquet_rows_have_their_tools_too(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"messages": [CHAT, CHAT[:1]], "tools": [json.dumps(TOOLS), None], "id": [1, 2]}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    seen: list[Any] = []
    read(tmp_path / "a.parquet", chat=recorder(seen))
    assert seen == [(CHAT, TOOLS), (CHAT[:1], None)]
