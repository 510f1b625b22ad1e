import json
from pathlib import Path

import pytest

from camera_serve.calibration.text import calibration_tokens
from camera_serve.errors import CalibrationError
from camera_serve.recipe import Calibration
from tests import tiny_models

TEXT = "".join(f"sentence number {i} of the text. " for i in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.tokenizer().save_pretrained(path)
    return path


def settings(path: Path, **changes: int) -> Calibration:
    return Calibration(source=str(path), **({"samples": 4, "seq_len": 16} | changes))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_windows_are_consecutive_cuts_of_the_text(tmp_path: Path, model: Path) -> None:
    tokens = calibration_tokens(settings(write(tmp_path / "a.txt", TEXT)), model)
    ids = tiny_models.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    cuts = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert tokens.shape == (4, 16)
    assert all(row in cuts for row in tokens.tolist())
    assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_the_seed_decides_the_windows(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.txt", TEXT)
    first, again, other = (
        calibration_tokens(settings(file, seed=s), model).tolist() for s in (0, 0, 1)
    )
    assert first == again != other


def test_jsonl_and_txt_of_the_same_documents_agree(tmp_path: Path, model: Path) -> None:
    documents = [TEXT[:3000], TEXT[3000:]]
    text = write(tmp_path / "a.txt", "\n\n".join(documents))
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": d}) for d in documents))
    wanted = calibration_tokens(settings(text), model)
    assert calibration_tokens(settings(lines), model).equal(wanted)


def test_too_little_text_says_found_needed_and_what_would_fit(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.txt", TEXT)
    found = len(tiny_models.tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    wanted = f"holds {found:,} tokens; 1000 samples of 16 need 16,000: .*--samples {found // 16} or"
    with pytest.raises(CalibrationError, match=wanted):
        calibration_tokens(settings(file, samples=1000), model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", "x", "neither a .txt, .jsonl, .parquet file nor"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', 'line 2: wanted an object with a "text" key'),
        ("a.jsonl", "nonsense", "line 1: wanted an object"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path, model: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_tokens(settings(write(tmp_path / name, content)), model)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CalibrationError, match=r"absent\.txt does not exist"):
        calibration_tokens(settings(tmp_path / "absent.txt"), model)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        calibration_tokens(settings(tmp_path / "a.txt"), model)


def test_a_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no tokenizer that loads"):
        calibration_tokens(settings(write(tmp_path / "a.txt", TEXT)), tmp_path)
