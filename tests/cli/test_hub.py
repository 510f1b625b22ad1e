"""Every command takes the hub's names for MODEL, and a copy of links is a model like any other."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from tests.benchmark import fake_vllm
from tests.cli.conftest import Run
from tests.editing import digest
from tests.fake_hub import COMMITS, MODEL, download, serving

TYPED = f"{MODEL}@v1"
PAGE = f"https://huggingface.co/{MODEL}/tree/v1"


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache with one revision of the model in it."""
    home = tmp_path_factory.mktemp("hf")
    with serving(model) as hub:
        done = download(hub, home, TYPED)
    assert done.returncode == 0, done.stderr
    return home / "hub"


@pytest.fixture(autouse=True)
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are offline anyway."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_compress_is_told_the_commit_and_writes_what_it_writes_of_a_folder(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    plan = ["--bits", "2", "--group-size", "32", *small]
    hub, folder = tmp_path / "hub", tmp_path / "folder"
    for source, output in ((TYPED, hub), (model, folder)):
        done = run("compress", source, "-o", output, *plan)
        assert done.exit_code == 0, done.output
    assert not any(file.is_symlink() for file in hub.rglob("*"))
    told = {"README.md", "camera_report.json", "camera.log"}
    ours, theirs = digest(hub), digest(folder)
    assert {name for name in theirs if ours[name] != theirs[name]} == told
    assert ours.keys() == theirs.keys()

    report = json.loads((hub / "camera_report.json").read_text())
    assert (report["model"], report["revision"]) == (MODEL, COMMITS["v1"])
    card = huggingface_hub.ModelCard.load(hub / "README.md")
    assert card.data.base_model == MODEL
    assert f"(https://huggingface.co/{MODEL}) at commit [`{COMMITS['v1']}`]" in card.text
    report = json.loads((folder / "camera_report.json").read_text())
    assert (report["model"], report["revision"]) == (model.name, None)
    assert f"The original is `{model.name}`." in (folder / "README.md").read_text()

    # The inputs are the same, wherever they lie.
    again = run("compress", PAGE, "-o", folder, *plan, "--resume")
    assert "nothing to resume" in again.stderr and again.exit_code == 0


def test_a_copy_in_the_cache_has_the_hubs_name_however_it_is_given(
    run: Run, cache: Path, small: list[str], tmp_path: Path
) -> None:
    (snapshot,) = (cache / f"models--{MODEL.replace('/', '--')}" / "snapshots").iterdir()
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for number, source in enumerate((TYPED, PAGE, snapshot, link)):
        output = tmp_path / str(number)
        done = run("analyze", source, "-o", output, *small)
        assert done.exit_code == 0, done.output
        report = json.loads((output / "camera_analysis.json").read_text())
        assert (report["model"], report["revision"]) == (MODEL, COMMITS["v1"])


@pytest.mark.parametrize("typed", [TYPED, PAGE])
def test_commands_that_read_take_it(
    run: Run, model: Path, small: list[str], tmp_path: Path, typed: str
) -> None:
    assert run("compress", model, "-o", tmp_path / "out", "--prune", "0.4", *small).exit_code == 0
    for arguments in (
        ["inspect", typed],
        ["verify", typed],
        ["verify", tmp_path / "out", "--against", typed],
        ["compress", typed, "-o", tmp_path / "other", "--prune", "0.4", *small, "--dry-run"],
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    refused = run("convert", typed, "--to", "dense", "-o", tmp_path / "other")
    assert refused.exit_code == 1 and "it is a dense checkpoint already" in refused.stderr


def test_bench_serves_the_copy(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = fake_vllm.install(monkeypatch, tmp_path)
    flags = ["--modes", "serve", "--concurrency", "1", "--repeats", "1"]
    done = run("bench", TYPED, "-o", tmp_path / "out.json", *flags)
    assert done.exit_code == 0, done.output
    assert fake_vllm.calls(command)[0]["model"] == COMMITS["v1"]
    assert json.loads((tmp_path / "out.json").read_text())["models"][0]["name"] == TYPED


@pytest.mark.parametrize(
    "command",
    [
        lambda name, out: ["compress", name, "-o", out, "--prune", "0.4"],
        lambda name, out: ["analyze", name, "-o", out],
        lambda name, out: ["inspect", name],
        lambda name, out: ["verify", name],
        lambda name, out: ["verify", TYPED, "--against", name],
        lambda name, out: ["convert", name, "--to", "dense", "-o", out],
        lambda name, out: ["bench", name, "-o", out],
    ],
)
def test_a_model_that_is_not_there_is_one_line_with_the_remedy(
    run: Run, tmp_path: Path, command: Callable[[str, Path], list[object]]
) -> None:
    result = run(*command("someone/other", tmp_path / "out"))
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        "error: there is no folder someone/other here, and HF_HUB_OFFLINE=1 keeps a model of that "
        "name, which is not whole on this machine, from being downloaded: correct the path, or "
        "unset it\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_model_of_the_hub_is_as_compress_wrote_it(
    run: Run, model: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("compress", model, "-o", out, "--prune", "0.4", *small).exit_code == 0
    with serving(out) as hub:
        done = download(hub, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    verified = run("verify", MODEL, "--against", model)
    assert verified.exit_code == 0 and "more that engines read" in verified.stdout, verified.output
    assert run("inspect", MODEL).exit_code == 0
    assert run("convert", MODEL, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    assert run("verify", tmp_path / "dense", "--against", model).exit_code == 0
