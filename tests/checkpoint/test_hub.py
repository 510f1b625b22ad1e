"""MODEL as people type it, through huggingface_hub's real client, against a server of our own."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from camera_serve.checkpoint.files import side_files
from camera_serve.checkpoint.hub import ModelName, origin_of, resolve
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from tests import tiny_models
from tests.editing import digest
from tests.fake_hub import COMMITS, MODEL, TOKEN, Hub, download, serving

PAGE = f"https://huggingface.co/{MODEL}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "model"
    tiny_models.save("qwen2_moe", path, max_shard_size="200KB")
    (path / "pytorch_model.bin").write_bytes(b"pickled")
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path


@pytest.fixture
def shard(folder: Path) -> str:
    """One of the model's files of weights."""
    _, second, *_ = sorted(file.name for file in folder.glob("model-*.safetensors"))
    return second


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving(folder) as found:
        yield found


@pytest.mark.parametrize(
    ("typed", "name", "revision"),
    [
        ("gpt2", "gpt2", None),
        (MODEL, MODEL, None),
        (f"{MODEL}@v1", MODEL, "v1"),
        (f"{MODEL}@refs/pr/1", MODEL, "refs/pr/1"),
        (PAGE, MODEL, None),
        (f"{PAGE}/", MODEL, None),
        (f"{PAGE}?library=transformers#use", MODEL, None),
        (f"{PAGE}/tree/v1", MODEL, "v1"),
        (f"{PAGE}/tree/refs%2Fpr%2F1", MODEL, "refs/pr/1"),
        (f"{PAGE}/commit/{'a' * 40}", MODEL, "a" * 40),
        (f"http://hf.co/{MODEL}", MODEL, None),
        (f"huggingface.co/{MODEL}", MODEL, None),
    ],
)
def test_a_name_is_read_as_people_type_it(typed: str, name: str, revision: str | None) -> None:
    assert ModelName.parse(typed) == ModelName(name, revision)


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("a/b/c", "is neither a local folder nor ORG/NAME"),
        ("./nowhere", "is neither a local folder"),
        ("/no/such/model", "is neither a local folder"),
        ("~/models/x", "is neither a local folder"),
        ("not a name!", "is neither a local folder"),
        ("someone/", "is neither a local folder"),
        (f"{MODEL}@", "is neither a local folder"),
        ("https://example.com/someone/tiny", r"is not a page of https://huggingface\.co"),
        (f"{PAGE}/tree/main/sub", f"is a part of a model: give {MODEL}@main"),
        (f"{PAGE}/blob/main/config.json", f"is a part of a model: give {MODEL}@main"),
        ("https://huggingface.co/datasets/someone/text", "is not the page of a model"),
        ("https://huggingface.co/", "is not the page of a model"),
    ],
)
def test_what_names_no_model_is_told_before_the_hub_is_asked(typed: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        resolve(typed)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MODEL}@v1").mkdir(parents=True)
    assert resolve(f"{MODEL}@v1") == Path(f"{MODEL}@v1")
    assert origin_of(Path(f"{MODEL}@v1")) == ModelName("tiny-moe@v1")


def test_a_sharded_model_is_downloaded_once_and_found_offline(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    for typed, commit in (
        (MODEL, COMMITS["main"]),
        (f"{MODEL}@v1", COMMITS["v1"]),
        (f"{hub.endpoint}/{MODEL}/tree/v1", COMMITS["v1"]),
        (f"{MODEL}@{COMMITS['v1']}", COMMITS["v1"]),
    ):
        done = download(hub, tmp_path, typed)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        assert path.name == commit and origin_of(path) == ModelName(MODEL, commit)
        asked = len(hub.asked)
        offline = download(hub, tmp_path, typed, HF_HUB_OFFLINE="1")
        assert (offline.stdout, len(hub.asked)) == (done.stdout, asked)
    wanted = {name: mark for name, mark in digest(folder).items() if name != "pytorch_model.bin"}
    assert digest(path) == wanted
    # The other revision has the same files, and the cache keeps one of each.
    sent = [name for name, _ in hub.downloads()]
    assert sorted(sent) == sorted(wanted)


def test_a_copy_is_used_when_the_hub_cannot_be_reached(hub: Hub, tmp_path: Path) -> None:
    wanted = download(hub, tmp_path).stdout
    hub.endpoint = "http://127.0.0.1:9"
    assert download(hub, tmp_path).stdout == wanted


def test_folders_of_links_are_read_like_any_other(
    hub: Hub, folder: Path, shard: str, tmp_path: Path
) -> None:
    path = Path(download(hub, tmp_path).stdout.strip())
    assert (path / shard).is_symlink() and (path / "config.json").is_symlink()
    assert side_files(path) == side_files(folder)
    assert Checkpoint.open(path).entries.keys() == Checkpoint.open(folder).entries.keys()
    link = tmp_path / "link"
    link.symlink_to(path)
    assert origin_of(link) == ModelName(MODEL, COMMITS["main"])
    # A clone without git-lfs that was put into the cache: small files behind links.
    blob = (path / shard).resolve()
    blob.chmod(0o644)
    blob.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"Git LFS pointers in place of {shard}"):
        Checkpoint.open(path)


def refusal(hub: Hub, home: Path, model: str = MODEL, **more: str) -> str:
    """The one line that a refused download ends with."""
    done = download(hub, home, model, **more)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_gated_model_is_told_with_where_to_accept_its_terms(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    assert refusal(hub, tmp_path) == (
        f"error: {MODEL} is gated: accept its terms at {hub.endpoint}/{MODEL}, then `hf auth "
        "login`, or set HF_TOKEN to a token of that account"
    )
    done = download(hub, tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


def test_a_model_or_a_revision_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    assert refusal(hub, tmp_path, "someone/other") == (
        "error: someone/other is neither a local folder nor a model that the hub "
        f"{hub.endpoint} shows us: check the name; for a private model `hf auth login`, or set "
        "HF_TOKEN"
    )
    assert refusal(hub, tmp_path, f"{MODEL}@v7") == (
        f"error: {MODEL} has no revision v7: its branches, tags and commits are at "
        f"{hub.endpoint}/{MODEL}/tree/main"
    )


def test_a_wrong_token_is_told(hub: Hub, tmp_path: Path) -> None:
    assert refusal(hub, tmp_path, HF_TOKEN="hf_wrong") == (
        f"error: the hub {hub.endpoint} refuses the token (401) that {MODEL} was asked for with: "
        "correct or unset HF_TOKEN, or `hf auth login` again"
    )


def test_offline_without_a_copy_is_told(hub: Hub, tmp_path: Path) -> None:
    assert refusal(hub, tmp_path, HF_HUB_OFFLINE="1") == (
        f"error: there is no folder {MODEL} here, and HF_HUB_OFFLINE=1 keeps a model of that name, "
        "which is not whole on this machine, from being downloaded: correct the path, or unset it"
    )
    named = refusal(hub, tmp_path, f"{MODEL}@v7", HF_HUB_OFFLINE="1")
    assert named.startswith(f"error: there is no folder {MODEL}@v7 here")
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.status = 503
    assert refusal(hub, tmp_path) == (
        f"error: there is no folder {MODEL} here, and the hub {hub.endpoint} answers 503 for it: "
        "correct the path, or try again later"
    )
    hub.endpoint = "http://127.0.0.1:9"
    said = refusal(hub, tmp_path)
    assert said.startswith(
        f"error: there is no folder {MODEL} here, and the hub http://127.0.0.1:9 cannot be reached "
        "(ConnectError: "
    )
    assert said.endswith("): correct the path, or check network and proxy")


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, shard: str, tmp_path: Path) -> None:
    # Larger than what the client reads at a time.
    hub.files[shard] = random.Random(0).randbytes(2**25)
    hub.cuts[shard] = 1
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (part for name, part in hub.downloads() if name == shard)
    assert first == "" and 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 2**24
    assert (Path(done.stdout.strip()) / shard).read_bytes() == hub.files[shard]


def test_a_broken_download_goes_on_with_what_is_missing(
    hub: Hub, folder: Path, shard: str, tmp_path: Path
) -> None:
    hub.cuts[shard] = 100
    said = refusal(hub, tmp_path)
    assert said.startswith(f"error: the download of {MODEL} broke off (")
    assert said.endswith("): run the same command again, and it goes on")
    offline = refusal(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith(f"error: there is no folder {MODEL} here, and HF_HUB_OFFLINE=1")
    hub.cuts.clear()
    hub.asked.clear()
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in hub.downloads()] == [shard]
    assert digest(Path(done.stdout.strip()))[shard] == digest(folder)[shard]


def test_a_cache_that_cannot_be_written_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    said = refusal(hub, tmp_path / "home")
    assert said.startswith(f"error: {MODEL} cannot be kept in {tmp_path / 'home' / 'hub'}: ")
    assert said.endswith(": set HF_HOME to a folder that can be written")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_way_to_another(hub: Hub, tmp_path: Path, code: int) -> None:
    full = (
        "import os; from huggingface_hub import file_download\n"
        f"def full(*given, **more): raise OSError({code}, os.strerror({code}))\n"
        "file_download.http_get = full"
    )
    assert refusal(hub, tmp_path, before=full) == (
        f"error: {MODEL} does not fit into {tmp_path / 'hub'} ({os.strerror(code)}): free some "
        "space, or set HF_HOME to a folder on another disk; then run the same command again, and "
        "it goes on"
    )
