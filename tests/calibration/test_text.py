import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from camera_serve.calibration import text
from camera_serve.calibration.text import calibration_windows, max_positions
from camera_serve.errors import CalibrationError
from camera_serve.recipe import Calibration
from tests import tiny_models

TEXT = "".join(f"sentence number {i} of the text. " for i in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.tokenizer().save_pretrained(path)
    return path


def settings(path: Path | tuple[Path, ...], **changes: int) -> Calibration:
    source = str(path) if isinstance(path, Path) else tuple(map(str, path))
    return Calibration(source=source, **({"samples": 4, "seq_len": 16} | changes))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_windows_are_consecutive_cuts_of_the_text(tmp_path: Path, model: Path) -> None:
    tokens = calibration_windows(settings(write(tmp_path / "a.txt", TEXT)), model).tokens
    ids = tiny_models.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    cuts = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert tokens.shape == (4, 16)
    assert all(row in cuts for row in tokens.tolist())
    assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_the_seed_decides_the_windows(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.txt", TEXT)
    first, again, other = (
        calibration_windows(settings(file, seed=s), model).tokens.tolist() for s in (0, 0, 1)
    )
    assert first == again != other


def test_jsonl_and_txt_of_the_same_documents_agree(tmp_path: Path, model: Path) -> None:
    documents = [TEXT[:3000], TEXT[3000:]]
    text = write(tmp_path / "a.txt", "\n\n".join(documents))
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": d}) for d in documents))
    wanted = calibration_windows(settings(text), model).tokens
    assert calibration_windows(settings(lines), model).tokens.equal(wanted)


def test_too_little_text_says_found_needed_and_what_would_fit(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.txt", TEXT)
    found = len(tiny_models.tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    wanted = f"holds {found:,} tokens; 1000 samples of 16 need 16,000: .*--samples {found // 16} or"
    with pytest.raises(CalibrationError, match=wanted):
        calibration_windows(settings(file, samples=1000), model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", "x", "neither a .txt, .jsonl, .json or .parquet file"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"body": "y"}',
            "line 2: an object with body, wanted an object",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', 'line 2: "text" is a number, wanted a string'),
        ("a.jsonl", "nonsense", "line 1: not JSON"),
        ("a.jsonl", '"x"\n[1, 2]', "line 2: a list, wanted an object"),
        ("a.json", '{"rows": ["x"]}', r"a\.json, line 1: an object with rows, wanted an object"),
        ("a.json", '[{"text": "x"}, 7]', "element 2: a number, wanted an object"),
        ("a.json", '[{"text": "x"}, {"text"', "element 2: not JSON"),
        ("a.jsonl", '{"messages": "hello"}', '"messages" is a string, wanted a list of turns'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "turn 1 has role .*, wanted an object"),
        ("a.txt.gz", "not packed", "cannot be read: Not a gzipped file"),
        ("a.parquet", "x", "parquet"),
        ("a.txt", "", "holds 0 tokens"),
        ("a.txt", " \n\n ", "holds . tokens"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path, model: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(settings(write(tmp_path / name, content)), model)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CalibrationError, match=r"absent\.txt does not exist"):
        calibration_windows(settings(tmp_path / "absent.txt"), model)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        calibration_windows(settings(tmp_path / "a.txt"), model)


def test_a_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no tokenizer that"):
        calibration_windows(settings(write(tmp_path / "a.txt", TEXT)), tmp_path)


FORMS = {
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "blank lines.jsonl": lambda rows: "\n\n".join(map(json.dumps, rows)) + "\n\n",
    "bom.jsonl": lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)),
    "UPPER.JSONL": lambda rows: "\r\n".join(map(json.dumps, rows)),
    "list.json": lambda rows: json.dumps(rows),
    "lines.json": lambda rows: "\n".join(map(json.dumps, rows)),
    "indented.json": lambda rows: "\n" + json.dumps(rows, indent=2) + "\n",
    "strings.jsonl": lambda rows: "\n".join(json.dumps(row["text"]) for row in rows),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_windows(
    name: str, packed: bool, tmp_path: Path, model: Path
) -> None:
    documents = [TEXT[:3000], "Ünïcode, 漢字 and 🙂. ", TEXT[3000:]]
    plain = write(tmp_path / "a.txt", "\n\n".join(documents))
    content = FORMS[name]([{"text": text} for text in documents]).encode()
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(content) if packed else content)
    wanted = calibration_windows(settings(plain), model)
    found = calibration_windows(settings(file), model)
    assert found.tokens.equal(wanted.tokens) and found.skipped == {}


def test_rows_without_text_are_skipped_and_counted(tmp_path: Path, model: Path) -> None:
    rows = [{"text": TEXT}, {"text": None}, {"text": ""}, {"messages": None}, {"messages": []}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = calibration_windows(settings(file), model)
    assert found.skipped == {"rows without text": 4}
    plain = write(tmp_path / "a.txt", TEXT)
    assert found.tokens.equal(calibration_windows(settings(plain), model).tokens)


def test_several_files_and_a_folder_of_them_are_one_text(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    first, second = write(folder / "a.txt", TEXT), folder / "inner" / "b.jsonl"
    write(second, json.dumps({"text": TEXT.upper()}))
    write(folder / "notes.md", "not read")
    write(folder / ".hidden.txt", "not read")
    wanted = calibration_windows(settings((first, second)), model)
    found = calibration_windows(settings(folder), model)
    assert found.tokens.equal(wanted.tokens)
    assert (wanted.skipped, found.skipped) == ({}, {"files of other kinds": 1})


def test_a_folder_without_texts_is_named(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "notes.md", "x")
    with pytest.raises(CalibrationError, match=r"holds no text: put a \.txt, .* into it"):
        calibration_windows(settings(tmp_path), model)


CHATS = {
    "messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes. "}],
    "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": "Yes. "}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": TEXT}]},
        {"role": "assistant", "content": "Yes. "},
    ],
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.parametrize("form", CHATS)
def test_chats_are_rendered_by_the_models_template(
    form: str, tmp_path: Path, chat_model: Path
) -> None:
    key = "messages" if form == "parts" else form
    chats = write(tmp_path / "a.jsonl", json.dumps({key: CHATS[form], "id": 7}))
    rendered = write(tmp_path / "a.txt", f"<user>{TEXT}<assistant>Yes. ")
    wanted = calibration_windows(settings(rendered), chat_model).tokens
    assert calibration_windows(settings(chats), chat_model).tokens.equal(wanted)


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path, chat_model: Path) -> None:
    rows = [{"messages": CHATS["messages"]}, {"messages": [{"role": "tool", "content": "x"}]}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(CalibrationError, match=r'line 2: "messages" is refused .*no such role'):
        calibration_windows(settings(file), chat_model)


def test_chats_without_a_template_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    file = write(tmp_path / "a.jsonl", json.dumps({"messages": CHATS["messages"]}))
    with pytest.raises(CalibrationError, match="has no chat template for rows of chat"):
        calibration_windows(settings(file), tmp_path / "plain")


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "\\ud83d ' + TEXT + '"}')
    plain = write(tmp_path / "a.txt", "\ufffd " + TEXT)
    wanted = calibration_windows(settings(plain), model).tokens
    assert calibration_windows(settings(file), model).tokens.equal(wanted)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are drawn from begin at 2000 characters, so that tests are quick."""
    monkeypatch.setattr(text, "WHOLE", 2000)
    monkeypatch.setattr(text, "LEAST_BLOCKS", 32)
    monkeypatch.setattr(text, "SHORTEST_BLOCK", 256)


def numbered(count: int) -> str:
    return "".join(f"line {i:06d} of the corpus.\n" for i in range(count))


def lines_of(tokens: torch.Tensor) -> list[int]:
    found = [tiny_models.tokenizer().decode(row) for row in tokens.tolist()]
    return [int(re.search(r"line (\d{6})", window)[1]) for window in found]  # type: ignore[index]


def test_windows_of_a_long_text_come_from_all_of_it(
    short: None, tmp_path: Path, model: Path
) -> None:
    file = write(tmp_path / "a.txt", numbered(4000))
    drawn = [
        line
        for seed in range(40)
        for line in lines_of(
            calibration_windows(settings(file, seed=seed, seq_len=32), model).tokens
        )
    ]
    assert len(drawn) == 160
    # 160 draws in ten equal parts: 16 each, with a standard deviation of 3.8.
    parts = torch.bincount(torch.tensor(drawn) // 400, minlength=10)
    assert parts.min() >= 4 and parts.max() <= 32


def test_windows_of_a_long_text_are_pieces_of_it_once_each(
    short: None, tmp_path: Path, model: Path
) -> None:
    file = write(tmp_path / "a.txt", numbered(4000))
    found = calibration_windows(settings(file, samples=12, seq_len=32), model).tokens
    again = calibration_windows(settings(file, samples=12, seq_len=32), model).tokens
    other = calibration_windows(settings(file, samples=12, seq_len=32, seed=1), model).tokens
    assert found.equal(again) and not found.equal(other)
    assert found.shape == (12, 32) and len(set(lines_of(found))) == 12
    whole = file.read_text()
    for row in found.tolist():
        assert tiny_models.tokenizer().decode(row) in whole


def test_a_long_text_in_rows_gives_the_windows_of_the_same_text_in_one_file(
    short: None, tmp_path: Path, model: Path
) -> None:
    documents = [numbered(40).replace("corpus", f"document {i}") for i in range(60)]
    plain = write(tmp_path / "a.txt", "\n\n".join(documents))
    rows = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": d}) for d in documents))
    wanted = calibration_windows(settings(plain, seq_len=32), model).tokens
    assert calibration_windows(settings(rows, seq_len=32), model).tokens.equal(wanted)


def test_long_runs_of_few_tokens_are_drawn_in_longer_pieces(
    short: None, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LEAST_BLOCKS", 2)
    monkeypatch.setattr(text, "SHORTEST_BLOCK", 64)
    file = write(tmp_path / "a.txt", numbered(2000))
    counts = []

    def sparse(self: object, piece: str) -> list[int]:
        counts.append(len(piece))
        return list(range(len(piece) // 20))

    monkeypatch.setattr(text._Tokenizer, "_ids", sparse)
    found = calibration_windows(settings(file, samples=2, seq_len=16), model).tokens
    assert found.shape == (2, 16) and max(counts) > 320


def test_most_of_a_long_text_is_not_tokenized(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.txt", numbered(100_000))
    tokenized = 0
    before = text._Tokenizer._ids

    def counted(self: Any, piece: str) -> list[int]:
        nonlocal tokenized
        tokenized += len(piece)
        return before(self, piece)

    monkeypatch.setattr(text._Tokenizer, "_ids", counted)
    calibration_windows(settings(file, seq_len=64), model)
    least = text.LEAST_BLOCKS * text.SHORTEST_BLOCK
    assert 4 * 64 <= tokenized <= 1.2 * least < file.stat().st_size / 15


def test_a_text_that_is_nearly_all_needed_is_tokenized_in_parts(
    short: None, tmp_path: Path, model: Path
) -> None:
    file = write(tmp_path / "a.txt", numbered(300))
    ids = tiny_models.tokenizer()(file.read_text(), add_special_tokens=False)["input_ids"]
    samples = len(ids) // 64
    found = calibration_windows(settings(file, samples=samples, seq_len=64), model).tokens
    spare = len(ids) - samples * 64
    cuts = [torch.tensor(ids[first:])[: samples * 64].view(-1, 64) for first in range(spare + 1)]
    assert sorted(found.tolist()) in [sorted(cut.tolist()) for cut in cuts]


WORDS = 3000
ROWS_OF: dict[str, tuple[str, Any]] = {
    "one text": ("a.txt", lambda words: " ".join(words)),
    "rows": ("a.jsonl", lambda words: "\n".join(json.dumps({"text": t}) for t in cuts(words, 7))),
    "chats": ("a.jsonl", lambda words: "\n".join(json.dumps(chat(t)) for t in cuts(words, 40))),
    "chats and texts": (
        "a.json",
        lambda words: json.dumps(
            [{"text": t} if n % 3 else chat(t) for n, t in enumerate(cuts(words, 90))]
        ),
    ),
}


def chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def cuts(words: list[str], longest: int) -> list[str]:
    """Texts of 1 to `longest` words."""
    chance, found, at = random.Random(0), list[str](), 0
    while at < len(words):
        found.append(" ".join(words[at : at + chance.randint(1, longest)]))
        at += len(found[-1].split())
    return found


@pytest.fixture(scope="module")
def unique(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tokenizer that knows every word of a text, and these words: long ones in the middle."""
    lengths = [4 if abs(i - WORDS // 2) > WORDS // 6 else 12 for i in range(WORDS)]
    words = [f"{i:04}".ljust(lengths[i], "x") for i in range(WORDS)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, "?"])}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="?",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    path = tmp_path_factory.mktemp("unique")
    tokenizer.save_pretrained(path)
    return path, words


def starts_of(found: torch.Tensor) -> list[int]:
    """The place of every window's first word; each holds the words that follow it, once each."""
    samples, seq_len = found.shape
    assert found.equal(found[:, :1] + torch.arange(seq_len))
    assert len(found.unique()) == samples * seq_len
    return found[:, 0].tolist()


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "all tokenized"])
@pytest.mark.parametrize("form", ROWS_OF)
def test_every_window_of_a_long_text_has_the_same_chance(
    form: str,
    drawn: bool,
    short: None,
    tmp_path: Path,
    unique: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, words = unique
    name, write_rows = ROWS_OF[form]
    file = write(tmp_path / name, write_rows(words))
    loaded = text.load_tokenizer(model)
    monkeypatch.setattr(text, "load_tokenizer", lambda model: loaded)
    if not drawn:
        monkeypatch.setattr(text, "LEAST_BLOCKS", 1000)
    seeds, seq_len, samples = 1000 if drawn else 150, 16, 4
    counts = torch.zeros(WORDS - seq_len + 1)
    for seed in range(seeds):
        wanted = settings(file, seed=seed, samples=samples, seq_len=seq_len)
        for start in starts_of(calibration_windows(wanted, model).tokens):
            counts[start] += 1
    expected = samples * seeds / len(counts)
    # Groups of 199 starts, and of 16 at both ends, as whole windows begin only before the last one.
    for size, part in ((199, counts), (16, counts[:16]), (16, counts[-16:])):
        groups = part.view(-1, size).sum(1)
        chi_square = float(((groups - size * expected) ** 2 / (size * expected)).sum())
        assert chi_square <= len(groups) + 4 * (2 * len(groups)) ** 0.5, groups


@pytest.mark.parametrize("spare", [0, 1, 5, 16, 17, 40])
def test_as_many_windows_as_a_text_has_can_be_drawn(
    short: None, tmp_path: Path, unique: tuple[Path, list[str]], spare: int
) -> None:
    model, words = unique
    file = write(tmp_path / "a.txt", " ".join(words[: 16 * 40 + spare]))
    assert file.stat().st_size > text.WHOLE
    for seed in range(8):
        wanted = settings(file, seed=seed, samples=40 + spare // 16)
        assert len(starts_of(calibration_windows(wanted, model).tokens)) == wanted.samples


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_text_of_usual_length_is_cut_from_its_begin(
    tmp_path: Path, unique: tuple[Path, list[str]], ends: str
) -> None:
    """Recipes of every version draw these windows."""
    model, words = unique
    (tmp_path / "a.txt").write_bytes(ends.join(words).encode())
    for seed in range(3):
        wanted = settings(tmp_path / "a.txt", seed=seed, samples=20)
        cut = torch.arange(WORDS // 16 * 16).view(-1, 16)
        order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
        assert calibration_windows(wanted, model).tokens.equal(cut[order[:20]])


def test_chats_are_rendered_where_they_are_drawn(
    tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", 100_000)
    rows = (json.dumps(chat(f"chat {i}: " + TEXT[:300])) for i in range(8000))
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    rendered = 0
    before = text._Tokenizer.render

    def counted(self: Any, turns: Any, tools: Any) -> str:
        nonlocal rendered
        rendered += 1
        return before(self, turns, tools)

    monkeypatch.setattr(text._Tokenizer, "render", counted)
    found = calibration_windows(settings(file, seq_len=64), chat_model).tokens
    assert found.shape == (4, 64) and 0 < rendered < 2000


def test_a_template_that_refuses_a_drawn_row_names_it(
    short: None, tmp_path: Path, chat_model: Path
) -> None:
    rows = [chat(TEXT[:300]) for _ in range(200)]
    rows += [{"messages": [{"role": "tool", "content": TEXT[:300]}]}] * 200
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(CalibrationError, match=r'line [23]\d\d: "messages" is refused .*no such r'):
        calibration_windows(settings(file), chat_model)


def rope(**scaling: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 1e4, **scaling}}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (rope(rope_type="default"), 4096),
        (rope(rope_type="linear", factor=4.0), 16384),
        (rope(rope_type="dynamic", factor=2.0), 8192),
        (rope(rope_type="linear", factor=0.5), 4096),
        (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096), 16384),
        (rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=512), 4096),
        (rope(rope_type="yarn", factor=40, original_max_position_embeddings=4096), 163840),
    ],
)
def test_rope_scaling_reaches_farther(config: dict[str, Any], limit: int) -> None:
    assert max_positions(AutoConfig.for_model("qwen2_moe", **config)) == limit


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 64),
        ([], 64),
        ({"factor": float("inf")}, 64),
        ({"factor": "many"}, 64),
        ({"rope_type": "default", "factor": 4.0}, 64),
        ({"full_attention": {"factor": 2.0}, "sliding_attention": {}}, 128),
    ],
)
def test_positions_of_unusual_configs(rope: Any, limit: int) -> None:
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    assert max_positions(config) == limit  # type: ignore[arg-type]
    assert max_positions(SimpleNamespace()) is None  # type: ignore[arg-type]


def test_reading_is_bounded_whatever_the_corpus(tmp_path: Path, model: Path) -> None:
    """60 MB of text, as one document and as rows, beside 1 MB: in fresh processes."""
    small = write(tmp_path / "small.txt", numbered(36_000)[:1_000_000])
    large = write(tmp_path / "large.txt", numbered(36_000) * 58)
    rows = write(tmp_path / "rows.jsonl", (json.dumps({"text": numbered(40)}) + "\n") * 55_000)
    peaks = [peak_of(file, model) for file in (small, large, rows)]
    assert max(peaks[1:]) <= 1.3 * peaks[0], peaks


def peak_of(file: Path, model: Path) -> int:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from camera_serve.calibration.text import calibration_windows\n"
        "from camera_serve.recipe import Calibration\n"
        "calibration = Calibration(source=sys.argv[1], samples=4, seq_len=64)\n"
        "calibration_windows(calibration, Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", program, str(file), str(model)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
