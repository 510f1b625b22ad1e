"""No calibration ends in a traceback, or leaves anything behind that cannot be resumed."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import Run
from tests.editing import Tensors, edit_config, edit_weights

ROWS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=3), max_size=3),
    st.fixed_dictionaries({"text": st.one_of(st.none(), st.integers(), st.text(max_size=30))}),
    st.fixed_dictionaries({"body": st.text(max_size=5)}),
    st.fixed_dictionaries(
        {
            "messages": st.one_of(
                st.none(),
                st.text(max_size=5),
                st.lists(
                    st.one_of(
                        st.none(),
                        st.fixed_dictionaries({"role": st.text(max_size=9)}),
                        st.fixed_dictionaries(
                            {
                                "role": st.sampled_from(["user", "assistant", "tool", ""]),
                                "content": st.one_of(st.none(), st.integers(), st.text(max_size=9)),
                            }
                        ),
                    ),
                    max_size=3,
                ),
            )
        }
    ),
)
LINES = st.lists(ROWS, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
LISTS = st.lists(ROWS, max_size=4).map(lambda rows: json.dumps(rows).encode())
CONTENTS = st.one_of(LINES, LISTS, st.binary(max_size=60), st.text(max_size=200).map(str.encode))
NAMES = st.sampled_from(
    ["a.txt", "a.jsonl", "A.JSONL", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.gz", "a.csv", "a"]
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    return model, tmp_path_factory.mktemp("hostile")


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=NAMES,
    content=CONTENTS,
    packed=st.booleans(),
    samples=st.sampled_from(["-1", "0", "1", "4", "1000000000000", "x"]),
    seq_len=st.sampled_from(["1", "2", "64", "5000", "1000000000"]),
)
def test_any_text_and_settings_end_in_a_result_or_one_error(
    run: Run,
    hostile: tuple[Path, Path],
    name: str,
    content: bytes,
    packed: bool,
    samples: str,
    seq_len: str,
) -> None:
    model, folder = hostile
    file = folder / name
    file.write_bytes(gzip.compress(content) if packed and name.endswith(".gz") else content)
    out = folder / "out"
    flags = ["--calibration", file, "--samples", samples, "--seq-len", seq_len]
    result = run("compress", model, "-o", out, "--prune", "0.4", *flags)
    assert result.exit_code in (0, 1, 2), result.output
    if result.exit_code:
        errors = [line for line in result.output.splitlines() if line.lower().startswith("error")]
        assert len(errors) == 1, result.output
    assert out.exists() == (result.exit_code == 0)
    assert not list(folder.glob("out.*")), result.output
    file.unlink()
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def refused(run: Run, command: str, model: Path, out: Path, flags: list[str], *named: str) -> None:
    wanted = [] if command == "analyze" else ["--prune", "0.4"]
    result = run(command, model, "-o", out, *wanted, *flags)
    assert result.exit_code == 1, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert all(name in result.output for name in named), result.output
    assert list(out.parent.glob(out.name + "*")) == []
    assert error


COMMANDS = pytest.mark.parametrize("command", ["compress", "analyze"])


@COMMANDS
def test_windows_longer_than_the_models_positions_are_refused(
    run: Run, copy: Path, tmp_path: Path, calibration: Path, command: str
) -> None:
    edit_config(copy, lambda config: config.update(max_position_embeddings=63))
    flags = ["--calibration", str(calibration), "--samples", "2", "--seq-len", "64"]
    named = ("64 tokens", "63 positions", "--seq-len 63")
    refused(run, command, copy, tmp_path / "out", flags, *named)
    if command == "compress":
        refused(run, command, copy, tmp_path / "out", [*flags, "--dry-run"], *named)


@COMMANDS
def test_tokens_the_model_does_not_have_are_refused(
    run: Run, copy: Path, tmp_path: Path, small: list[str], command: str
) -> None:
    def cut(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:40].clone()

    edit_weights(copy, cut)
    edit_config(copy, lambda config: config.update(vocab_size=40))
    refused(run, command, copy, tmp_path / "out", small, "the model has 40", "another model")


def broken_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].nothing.at_all }}")


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "none"}}')


@COMMANDS
@pytest.mark.parametrize(
    ("spoil", "rows", "named"),
    [
        (broken_template, [{"messages": [{"role": "user", "content": "x"}]}], "chat template"),
        (broken_tokenizer, [{"text": "x"}], "has no tokenizer that"),
    ],
)
def test_a_tokenizer_or_template_that_fails_is_named(
    run: Run,
    copy: Path,
    tmp_path: Path,
    command: str,
    spoil: Callable[[Path], None],
    rows: list[object],
    named: str,
) -> None:
    spoil(copy)
    text = tmp_path / "chat.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--calibration", str(text), "--samples", "2", "--seq-len", "16"]
    refused(run, command, copy, tmp_path / "out", flags, named)


@COMMANDS
def test_what_was_skipped_is_said(
    run: Run, model: Path, tmp_path: Path, calibration: Path, command: str
) -> None:
    rows = [{"text": calibration.read_text()}, {"text": None}, {"text": ""}]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--calibration", text, "--samples", "4", "--seq-len", "64"]
    wanted = [] if command == "analyze" else ["--prune", "0.4"]
    result = run(command, model, "-o", tmp_path / "out", *wanted, *flags)
    assert result.exit_code == 0, result.output
    assert "calibration text: skipped 2 rows without text" in result.output


def test_several_sources_are_kept_in_the_recipe_and_used_again(
    run: Run, model: Path, tmp_path: Path, calibration: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(calibration.read_text().upper())
    flags = ["--calibration", calibration, "--calibration", other, "--samples", "4"]
    first, again = tmp_path / "first", tmp_path / "again"
    arguments = ["--prune", "0.4", *flags, "--seq-len", "64"]
    assert run("compress", model, "-o", first, *arguments).exit_code == 0
    recipe = first / "camera_recipe.yaml"
    assert run("compress", model, "-o", again, "--recipe", recipe).exit_code == 0
    assert recipe.read_bytes() == (again / "camera_recipe.yaml").read_bytes()
    assert (first / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_a_recipe_of_version_1_still_loads(
    run: Run, model: Path, tmp_path: Path, calibration: Path, small: list[str]
) -> None:
    first = tmp_path / "first"
    assert run("compress", model, "-o", first, "--prune", "0.4", *small).exit_code == 0
    recipe = tmp_path / "old.yaml"
    recipe.write_text(
        (first / "camera_recipe.yaml").read_text().replace("version: 2", "version: 1")
    )
    result = run("compress", model, "-o", tmp_path / "again", "--recipe", recipe)
    assert result.exit_code == 0, result.output
