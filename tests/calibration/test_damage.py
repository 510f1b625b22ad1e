"""Damaged calibration files of every kind: windows, or one error that names the file."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera_serve.calibration import documents, text
from camera_serve.calibration.text import calibration_windows
from camera_serve.errors import CalibrationError
from camera_serve.recipe import Calibration
from tests import tiny_models

WORDS = "The quick brown fox, 漢字 and 🙂, jumps over the lazy dog. "
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


def rows(chance: random.Random) -> list[Any]:
    turns = [
        {"role": "user", "content": WORDS * chance.randint(1, 5)},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": [{"type": "text", "text": "4"}]},
    ]
    said = [{"from": "human", "value": WORDS}, {"from": "gpt", "value": "Yes."}]
    kinds = [
        {"text": WORDS * chance.randint(1, 20), "id": 7, "score": -1.5e3},
        WORDS,
        {"messages": turns, "tools": TOOLS},
        {"messages": turns, "tools": json.dumps(TOOLS)},
        {"conversations": said},
        {"text": None, "messages": []},
    ]
    return [kinds[0], *(chance.choice(kinds) for _ in range(chance.randint(5, 60)))]


def parquet(rows: list[Any]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = arrow.BufferOutputStream()
    texts = [row["text"] if isinstance(row, dict) and "text" in row else WORDS for row in rows]
    parquet.write_table(arrow.table({"text": texts}), sink)
    return bytes(sink.getvalue())


FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.txt": lambda rows: "\r\n".join(map(str, rows)).encode(),
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "lines.json": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "list.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "a.parquet": parquet,
}
PIECES = (
    *(b"\xff", b"\x00", b"\r", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\\ud83d"),
    *(b"null", b"-", b"1e999", b"NaN", b"\xef\xbb\xbf", b"\xe6\xbc", b'{"text": 3}', b"[" * 3000),
    *(b"9" * 5000, b'{"messages": ' * 1200, b'"role"', b'"content"', b"tool_calls"),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    at, end = sorted(chance.choices(range(len(data) + 1), k=2))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[end:],
        lambda: data[:end] + data[at:],
        lambda: data[:at] + chance.choice(PIECES) + data[at:],
        lambda: data[:at] + chance.choice(PIECES) + data[at + 1 :],
        lambda: data[:at] + chance.randbytes(3) + data[at + 3 :],
        lambda: data.replace(*chance.choices((b'"', b"{", b"text", b"role", b"\n", b", "), k=2)),
        lambda: data + data,
        lambda: b"",
    )
    return chance.choice(ways)()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMS)
def test_a_damaged_file_gives_windows_or_one_error_that_names_it(
    name: str, packed: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_ROW", 10_000)
    monkeypatch.setattr(text, "LEAST_BLOCKS", 16)
    monkeypatch.setattr(text, "SHORTEST_BLOCK", 64)
    loaded = text.load_tokenizer(model)
    monkeypatch.setattr(text, "load_tokenizer", lambda model: loaded)
    chance, ends = random.Random(name + packed), []
    for _ in range(100):
        monkeypatch.setattr(documents, "READ_AT_ONCE", chance.choice((7, 300, 1 << 20)))
        monkeypatch.setattr(text, "WHOLE", chance.choice((500, 1_500_000)))
        data = FORMS[name](rows(chance))
        # Damage of what is packed, and of the packing.
        inner = chance.random() < 0.5 or not packed
        data = damaged(data, chance) if inner else data
        data = gzip.compress(data, mtime=0) if packed else data
        data = data if inner else damaged(data, chance)
        file = tmp_path / (name + packed)
        file.write_bytes(data)
        settings = Calibration(source=str(file), samples=2, seq_len=16, seed=chance.randrange(9))
        try:
            assert calibration_windows(settings, model).tokens.shape == (2, 16)
            ends.append("windows")
        except CalibrationError as error:
            assert str(file) in str(error)
            ends.append("error")
    least = 0 if name + packed == "a.parquet.gz" else 1
    assert ends.count("error") > 5 and ends.count("windows") >= least, ends
