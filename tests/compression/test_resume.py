"""One output folder, one run; and which interrupted runs a later one may continue."""

import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.errors import OutputError
from camera_serve.progress import OnProgress, Progress
from tests import tiny_models
from tests.editing import digest, edit_config, edit_weights
from tests.races import in_child, killed_in, race

MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "resume": {"resume": True},
    "overwrite": {"overwrite": True},
    "both": {"resume": True, "overwrite": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    return tiny_models.save("qwen2_moe", path, dtype=torch.float32, max_shard_size="500KB")


def recipe(text: Path, prune: float = 0.4, **changes: Any) -> Recipe:
    calibration = Calibration(source=str(text), samples=4, seq_len=32)
    return Recipe.paper(plan=TierPlan.prune(prune), calibration=calibration, align=4, **changes)


@pytest.fixture(scope="module")
def undisturbed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    compress(model, output, recipe(text))
    return output


def written(folder: Path) -> dict[str, str]:
    """All files but the log, which holds times."""
    return {name: value for name, value in digest(folder).items() if name != "camera.log"}


def interrupt(model: Path, output: Path, wanted: Recipe, done: int = 1, **mode: bool) -> None:
    """Leave a run behind with one layer of two finished."""

    def stop(progress: Progress) -> None:
        if progress.done == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, output, wanted, on_progress=stop, **mode)


def runs_in(
    model: Path, output: Path, wanted: Recipe, *modes: str
) -> list[Callable[[OnProgress], object]]:
    return [
        lambda report, mode=mode: compress(model, output, wanted, on_progress=report, **MODES[mode])
        for mode in modes
    ]


@pytest.mark.parametrize("modes", list(product(MODES, MODES)), ids="-".join)
def test_of_two_runs_at_one_moment_one_finishes_and_the_other_is_told(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path, modes: tuple[str, str]
) -> None:
    ends = race(*runs_in(model, tmp_path / "out", recipe(text), *modes))
    assert sorted(map(bool, ends)) == [False, True], ends
    told = max(ends)
    assert told.startswith(f"{tmp_path / 'out'} is being written by camera-serve compress (pid ")
    assert f" on {socket.gethostname()}, since 20" in told
    assert "another output" in told
    assert written(tmp_path / "out") == written(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("modes", list(product(("resume", "overwrite"), repeat=2)), ids="-".join)
@pytest.mark.parametrize("before", ["interrupted", "finished"])
def test_two_runs_over_what_an_earlier_one_left(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path, before: str, modes: tuple[str, str]
) -> None:
    output = tmp_path / "out"
    if before == "interrupted":
        interrupt(model, output, recipe(text))
    else:
        shutil.copytree(undisturbed, output)
    ends = race(*runs_in(model, output, recipe(text), *modes))
    assert not all(ends)
    # Resuming a finished run does nothing, so that a second run may still find the folder free.
    allowed = ("is being written by", *(("exists",) if before == "interrupted" else ()))
    assert all(any(words in end for words in allowed) for end in ends if end), ends
    assert written(output) == written(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_never_mixes_in(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    other = recipe(text, prune=0.6)
    compress(model, tmp_path / "other", other)
    first, second = tmp_path / "out", tmp_path / "out"
    ends = race(
        *runs_in(model, first, recipe(text), "overwrite"),
        *runs_in(model, second, other, "overwrite"),
    )
    whole = undisturbed if not ends[0] else tmp_path / "other"
    assert sorted(map(bool, ends)) == [False, True], ends
    assert written(tmp_path / "out") == written(whole)


@pytest.mark.parametrize("name", ["relative", "link", "parent link", "dots", "dangling link"])
def test_one_folder_under_two_names_is_one_folder(
    model: Path,
    text: Path,
    undisturbed: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "outs").mkdir()
    output = tmp_path / "outs" / "out"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent").symlink_to("outs")
    (tmp_path / "dangling").symlink_to(output)
    shutil.copytree(undisturbed, tmp_path / "outs" / "earlier")
    (tmp_path / "linked").symlink_to(tmp_path / "outs" / "earlier")
    pairs = {
        "relative": (output, Path("outs/out")),
        "link": (tmp_path / "outs" / "earlier", tmp_path / "linked"),
        "parent link": (output, tmp_path / "parent" / "out"),
        "dots": (output, tmp_path / "parent" / ".." / "outs" / "out"),
        "dangling link": (output, tmp_path / "dangling"),
    }
    one, other = pairs[name]
    ends = race(
        *runs_in(model, one, recipe(text), "overwrite"),
        *runs_in(model, other, recipe(text), "overwrite"),
    )
    assert sorted(map(bool, ends)) == [False, True], ends
    assert written(one) == written(undisturbed)
    assert sorted(path.name for path in (tmp_path / "outs").iterdir()) == sorted(
        {"earlier", one.name}
    )


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_a_killed_run_leaves_no_lock(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path, mode: str
) -> None:
    output = tmp_path / "new" / "out"
    killed_in(*runs_in(model, output, recipe(text), "plain"), step=1)
    with pytest.raises(OutputError, match="holds an interrupted run of compress"):
        compress(model, output, recipe(text))
    compress(model, output, recipe(text), **MODES[mode])
    assert written(output) == written(undisturbed)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def copied(model: Path, target: Path) -> Path:
    """The same bytes under another name, with times of today."""
    shutil.copytree(model, target, copy_function=shutil.copyfile)
    for file in target.iterdir():
        os.utime(file, (0, 0))
    return target


def test_a_copied_model_is_the_same_model(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    interrupt(model, tmp_path / "out", recipe(text))
    seen: list[Progress] = []
    again = copied(model, tmp_path / "elsewhere" / "model")
    report = compress(again, tmp_path / "out", recipe(text), resume=True, on_progress=seen.append)
    assert [progress.done for progress in seen] == [1, 2]
    assert written(tmp_path / "out") == written(undisturbed)
    assert compress(again, tmp_path / "out", recipe(text), resume=True) == report


def test_a_copied_calibration_text_is_the_same_text(
    model: Path, text: Path, tmp_path: Path
) -> None:
    interrupt(model, tmp_path / "out", recipe(text))
    moved = Path(shutil.copyfile(text, tmp_path / "moved.txt"))
    seen: list[Progress] = []
    compress(model, tmp_path / "out", recipe(moved), resume=True, on_progress=seen.append)
    assert [progress.done for progress in seen] == [1, 2]


def _scale(folder: Path, name: str, by: float) -> str:
    """Scale one tensor of a sharded model; the file it lies in."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    single = folder / "model.safetensors"
    (folder / index[name]).rename(single)
    edit_weights(folder, lambda tensors: tensors[name].mul_(by))
    single.rename(folder / index[name])
    return str(index[name])


@pytest.mark.parametrize("finished", [False, True])
def test_changed_weights_are_refused_by_file(
    model: Path, text: Path, tmp_path: Path, finished: bool
) -> None:
    if finished:
        compress(model, tmp_path / "out", recipe(text))
    else:
        interrupt(model, tmp_path / "out", recipe(text))
    before = digest(tmp_path)
    again = copied(model, tmp_path / "model")
    name = _scale(again, "model.layers.1.mlp.experts.3.up_proj.weight", 1.001)
    words = rf"file {name} of the model differs: use the model of that run.*--overwrite"
    with pytest.raises(OutputError, match=words):
        compress(again, tmp_path / "out", recipe(text), resume=True)
    shutil.rmtree(again)
    assert digest(tmp_path) == before


def _other_text(folder: Path, text: Path) -> Recipe:
    other = folder / "other.txt"
    other.write_text(text.read_text().replace("a", "e"))
    return recipe(other)


def _other_tokenizer(folder: Path, text: Path) -> Recipe:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["a"], data["model"]["vocab"]["b"] = (
        data["model"]["vocab"]["b"],
        data["model"]["vocab"]["a"],
    )
    file.write_text(json.dumps(data))
    return recipe(text)


def _other_config(folder: Path, text: Path) -> Recipe:
    edit_config(folder, lambda config: config.update(rms_norm_eps=1e-3))
    return recipe(text)


def _fewer_samples(folder: Path, text: Path) -> Recipe:
    return recipe(text).model_copy(
        update={"calibration": Calibration(source=str(text), samples=3, seq_len=32)}
    )


def _other_plan(folder: Path, text: Path) -> Recipe:
    return recipe(text, prune=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_text, "the calibration text gives other tokens: use the text of that run"),
        (_other_tokenizer, "file tokenizer.json of the model differs: use the model of that run"),
        (_other_config, "file config.json of the model differs: use the model of that run"),
        (_fewer_samples, "calibration.samples: then 4, now 3"),
        (_other_plan, "plan: then 16:0.6,0:0.4, now 16:0.5,0:0.5"),
    ],
)
def test_each_change_is_named_with_what_to_do(
    model: Path,
    text: Path,
    tmp_path: Path,
    change: Callable[[Path, Path], Recipe],
    words: str,
) -> None:
    interrupt(model, tmp_path / "out", recipe(text))
    again = copied(model, tmp_path / "model")
    wanted = change(again, text) if change is not _other_text else change(tmp_path, text)
    with pytest.raises(OutputError) as found:
        compress(again, tmp_path / "out", wanted, resume=True)
    said = str(found.value)
    assert said.startswith(f"{tmp_path / 'out.partial'} was begun at 20")
    # One cause, one sentence: other tokens follow from it.
    assert f" from other inputs: {words}; resume it with the inputs of that run, " in said
    assert said.endswith("start over with --overwrite, or choose another output")


def test_other_threads_and_versions_are_named_with_the_way_back(
    model: Path, text: Path, tmp_path: Path
) -> None:
    interrupt(model, tmp_path / "out", recipe(text))
    state = tmp_path / "out.partial" / ".state" / "fingerprint.json"
    begun = json.loads(state.read_text())
    begun["fingerprint"] |= {"threads": "8", "torch": "2.0.0"}
    state.write_text(json.dumps(begun))
    with pytest.raises(OutputError) as found:
        compress(model, tmp_path / "out", recipe(text), resume=True)
    assert "threads: then 8, now 1 (set OMP_NUM_THREADS=8)" in str(found.value)
    assert f"torch: then 2.0.0, now {torch.__version__}" in str(found.value)
    assert "(pip install torch==2.0.0)" in str(found.value)


OLD = {"model config": "0" * 16, "model weights": "1" * 16, "recipe.alpha": "0.95"}


def test_a_run_that_an_older_version_began_is_refused_in_words(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    interrupt(model, tmp_path / "out", recipe(text))
    state = tmp_path / "out.partial" / ".state" / "fingerprint.json"
    state.write_text(json.dumps(OLD))
    with pytest.raises(OutputError, match=r"by another version of camera-serve.*--overwrite"):
        compress(model, tmp_path / "out", recipe(text), resume=True)
    compress(model, tmp_path / "out", recipe(text), overwrite=True)
    assert written(tmp_path / "out") == written(undisturbed)


def test_an_output_of_an_older_version_is_refused_in_words(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    file = tmp_path / "out" / "camera_report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"fingerprint": OLD}))
    with pytest.raises(OutputError, match=r"by another version of camera-serve.*--overwrite"):
        compress(model, tmp_path / "out", recipe(text), resume=True)


def test_resuming_nothing_says_that_it_starts_anew(model: Path, text: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    compress(model, tmp_path / "out", recipe(text), resume=True, on_note=notes.append)
    partial = tmp_path / "out.partial"
    assert notes == [f"nothing to resume: {partial} holds no interrupted run; starting anew"]
    compress(model, tmp_path / "out", recipe(text), resume=True, on_note=notes.append)
    assert notes[1:] == [f"nothing to resume: {tmp_path / 'out'} is finished already"]
    interrupt(model, tmp_path / "next", recipe(text))
    compress(model, tmp_path / "next", recipe(text), resume=True, on_note=notes.append)
    assert len(notes) == 2


UNTIL_A_LAYER_IS_DONE = (
    "camera_serve.checkpoint.workspace.Workspace.record",
    "camera_serve.compression.pipeline.ModelStream.__init__",
    "camera_serve.compression.pipeline.ModelStream.embed",
    "camera_serve.compression.pipeline.compress_layer",
    "camera_serve.compression.pipeline.write_shard",
    "camera_serve.checkpoint.workspace.Workspace.commit",
)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, MemoryError])
@pytest.mark.parametrize("step", UNTIL_A_LAYER_IS_DONE)
def test_a_run_that_ends_before_a_layer_is_done_leaves_nothing(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(step, end)
        compress(model, tmp_path / "out", recipe(text))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", UNTIL_A_LAYER_IS_DONE[1:])
def test_a_resumed_run_that_ends_early_leaves_the_layers_that_were_done(
    model: Path,
    text: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    interrupt(model, tmp_path / "out", recipe(text))
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(step, end)
        compress(model, tmp_path / "out", recipe(text), resume=True)
    seen: list[Progress] = []
    compress(model, tmp_path / "out", recipe(text), resume=True, on_progress=seen.append)
    assert {progress.done for progress in seen} <= {1, 2}
    assert written(tmp_path / "out") == written(undisturbed)


def test_an_interrupted_overwrite_resumes_by_the_same_command(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output, both = tmp_path / "out", MODES["both"]
    compress(model, output, recipe(text, prune=0.6))
    interrupt(model, output, recipe(text), overwrite=True)
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=r"was made from other inputs: plan: .*--overwrite"):
        compress(model, output, recipe(text), resume=True)
    assert digest(tmp_path) == before
    seen: list[Progress] = []
    compress(model, output, recipe(text), on_progress=seen.append, **both)
    assert [progress.done for progress in seen] == [1, 2]
    assert written(output) == written(undisturbed)
    # Once more, it is finished.
    compress(model, output, recipe(text), on_progress=seen.append, **both)
    assert len(seen) == 2


def test_what_cannot_be_resumed_is_started_over_where_that_is_asked_for(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output, notes = tmp_path / "out", list[str]()
    interrupt(model, output, recipe(text, prune=0.6))
    compress(model, output, recipe(text), on_note=notes.append, **MODES["both"])
    assert written(output) == written(undisturbed)
    assert len(notes) == 1 and notes[0].startswith(f"nothing to resume: {output}.partial was begun")
    assert notes[0].endswith(
        "from other inputs: plan: then 16:0.4,0:0.6, now 16:0.6,0:0.4; starting anew"
    )


def test_a_folder_of_the_user_beside_the_output_is_left_alone(
    model: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("out.old", "out.analysis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter1.tex").write_text("years of work")
    compress(model, tmp_path / "out", recipe(text))
    compress(model, tmp_path / "out", recipe(text, prune=0.5), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.analysis", "out.old"]
    assert (tmp_path / "out.old" / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize("mode", MODES)
def test_a_working_folder_of_someone_else_is_left_alone(
    model: Path, text: Path, tmp_path: Path, mode: str
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "download.bin").write_text("half")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=r"out\.partial was not begun by camera-serve"):
        compress(model, tmp_path / "out", recipe(text), **MODES[mode])
    assert digest(tmp_path) == before


def test_a_model_that_lies_in_the_working_folder_is_not_its_own_output(
    model: Path, text: Path, tmp_path: Path
) -> None:
    source = copied(model, tmp_path / "out.partial")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match="overlap"):
        compress(source, tmp_path / "out", recipe(text), overwrite=True)
    assert digest(tmp_path) == before


def test_what_appears_at_the_output_meanwhile_is_not_replaced(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def appear(progress: Progress) -> None:
        output.mkdir(exist_ok=True)
        (output / "chapter1.tex").write_text("years of work")

    with pytest.raises(OutputError, match="out exists"):
        compress(model, output, recipe(text), on_progress=appear)
    assert (output / "chapter1.tex").read_text() == "years of work"
    output.rename(tmp_path / "mine")
    seen: list[Progress] = []
    compress(model, output, recipe(text), resume=True, on_progress=seen.append)
    assert [progress.done for progress in seen] == [2]
    assert written(output) == written(undisturbed)


def test_killed_between_the_renames_it_resumes(
    model: Path,
    text: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, rename = tmp_path / "out", Path.rename
    compress(model, output, recipe(text, prune=0.6))

    def killed(self: Path, target: Path) -> Path:
        if target == output:
            os._exit(9)
        return rename(self, target)

    def run(report: OnProgress) -> None:
        monkeypatch.setattr(Path, "rename", killed)
        compress(model, output, recipe(text), overwrite=True)

    child = in_child(lambda: run(lambda progress: None))
    child.join()
    assert child.exitcode == 9 and not output.exists()
    compress(model, output, recipe(text), resume=True)
    assert written(output) == written(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_it_makes_room_nothing_half_deleted_is_resumed(
    model: Path, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt(model, output, recipe(text), done=2)
    shutil.copytree(partial, tmp_path / "kept")
    removals = sum(file.is_file() for file in partial.rglob("*"))
    assert removals >= 6

    def overwrite_until(removal: int) -> None:
        left = iter(range(removal))

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "os.remove" and next(left, None) is None:
                os._exit(9)

        sys.addaudithook(watch)
        compress(model, output, recipe(text), overwrite=True)

    for removal in range(removals):
        child = in_child(lambda removal=removal: overwrite_until(removal))
        child.join()
        assert child.exitcode == 9
        compress(model, output, recipe(text), resume=True)
        assert written(output) == written(undisturbed), f"killed before removal {removal}"
        assert not partial.exists()
        shutil.rmtree(output)
        shutil.copytree(tmp_path / "kept", partial)


GOALS: dict[str, dict[str, Any]] = {
    "prune": {"plan": TierPlan.prune(0.4)},
    "size": {"size": 340_000, "allow": (4, 3, 2, 1, 0)},
}


def default_recipe(text: Path, goal: str) -> Recipe:
    """Enough tokens that experts are taken apart and fitted."""
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    return Recipe(**GOALS[goal], calibration=calibration, align=8, group_size=32)


def killed_at(run: Callable[[], object], moment: int, folder: Path) -> bool:
    """Run in a process that is killed before it opens, renames or removes a file of `folder` for
    the time `moment`; whether it came so far."""
    left = iter(range(moment))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        touched = event in ("open", "os.rename", "os.remove", "os.mkdir")
        if touched and str(folder) in str(arguments[0]) and next(left, None) is None:
            os._exit(9)

    def watched() -> None:
        sys.addaudithook(watch)
        run()

    child = in_child(watched)
    child.join()
    assert child.exitcode in (0, 9)
    return child.exitcode == 9


@pytest.mark.parametrize("goal", GOALS)
def test_killed_at_any_moment_of_any_step_it_resumes_to_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, goal: str
) -> None:
    wanted, whole = default_recipe(text, goal), tmp_path / "whole"
    compress(model, whole, wanted)
    found, moments = written(whole), random.Random(7)
    earlier, killed = 0, set[str]()
    for attempt in range(5):
        output = tmp_path / str(attempt)
        earlier += moments.randint(2, 14)
        if killed_at(lambda output=output: compress(model, output, wanted), earlier, output):
            killed.add(step_of(output))
        compress(model, output, wanted, resume=True)
        assert written(output) == found, f"killed at touch {earlier} of a file"
        assert not output.with_name(f"{attempt}.partial").exists()
    assert {"survey", "compress"} <= killed


def step_of(output: Path) -> str:
    """The step in which a run was killed."""
    state = output.with_name(f"{output.name}.partial") / ".state"
    return "compress" if (state / "hidden.safetensors").exists() else "survey"


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("step", ["allocate", "compress_layer", "_write_rest"])
def test_killed_as_a_step_begins_it_does_not_repeat_the_one_before(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, goal: str
) -> None:
    wanted = default_recipe(text, goal)

    def run() -> None:
        monkeypatch.setattr(f"camera_serve.compression.pipeline.{step}", lambda *_: os._exit(9))
        compress(model, tmp_path / "out", wanted)

    child = in_child(run)
    child.join()
    assert child.exitcode == 9
    seen: list[Progress] = []
    compress(model, tmp_path / "out", wanted, resume=True, on_progress=seen.append)
    done = [(progress.step, progress.done) for progress in seen]
    ends = [("compress", 2 if step == "_write_rest" else 0)]
    assert done[:1] == ends
    compress(model, tmp_path / "whole", wanted)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
