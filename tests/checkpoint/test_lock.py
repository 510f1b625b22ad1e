"""One writer for one output: in processes that start together, fork, and are killed."""

import errno
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from camera_serve.checkpoint.lock import sole_writer
from camera_serve.errors import OutputError
from tests.races import FORK, SECONDS, in_child


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.fixture(params=["locks", "no locks"], autouse=True)
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on a file system with locks, and on one without."""
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    return str(request.param)


def holding(output: Path, then: Callable[[], object] = lambda: time.sleep(SECONDS)) -> int:
    """The id of a process that holds the output, and does `then`."""
    held = FORK.Event()

    def hold() -> None:
        with sole_writer(output, "compress"):
            held.set()
            then()

    child = in_child(hold)
    assert held.wait(SECONDS)
    assert child.pid
    return child.pid


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_second_is_told_who_writes_and_what_to_do(tmp_path: Path) -> None:
    process = holding(tmp_path / "out")
    with (
        pytest.raises(OutputError) as found,
        sole_writer(tmp_path / "out", "convert"),
    ):
        pass
    kill(process)
    said = str(found.value)
    who = f"camera-serve compress (pid {process} on {socket.gethostname()}, since 20"
    assert said.startswith(f"{tmp_path / 'out'} is being written by {who}")
    assert "): wait for it, stop it, or choose another output" in said


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    told: list[str] = []

    def second() -> None:
        try:
            with sole_writer(tmp_path / "out", "analyze"):
                pass
        except OutputError as error:
            told.append(str(error))

    with sole_writer(tmp_path / "out", "compress"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(told) == 1 and f"pid {os.getpid()} " in told[0]


def test_nothing_is_left_after_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), sole_writer(tmp_path / "a" / "b" / "out", "compress"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with sole_writer(tmp_path / "a" / "b" / "out", "compress"):
        (tmp_path / "a" / "b" / "out").write_text("done")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == [
        "a",
        "a/b",
        "a/b/out",
    ]


def test_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    kill(holding(tmp_path / "out"))
    assert len(list(tmp_path.iterdir())) > 0
    with sole_writer(tmp_path / "out", "compress"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_a_killed_holder_does_not_hold(tmp_path: Path) -> None:
    sleeper = FORK.Value("i", 0)

    def fork() -> None:
        child = os.fork()
        if child:
            sleeper.value = child
        time.sleep(SECONDS)

    process = holding(tmp_path / "out", fork)
    while not sleeper.value:
        time.sleep(0.01)
    kill(process)
    try:
        with sole_writer(tmp_path / "out", "compress"):
            pass
    finally:
        os.kill(sleeper.value, signal.SIGKILL)


def test_a_forked_child_that_leaves_does_not_release(tmp_path: Path) -> None:
    holder = sole_writer(tmp_path / "out", "compress")
    with holder:
        child = os.fork()
        if child == 0:
            # As an error would that goes up through the child's copy of our frames.
            holder.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(OutputError), sole_writer(tmp_path / "out", "compress"):
            pass


def test_many_that_come_and_go_are_never_two(tmp_path: Path, file_system: str) -> None:
    output, alone = tmp_path / "out", tmp_path / "alone"
    entered = FORK.Value("i", 0)
    end = time.monotonic() + 1.5

    def worker() -> None:
        while time.monotonic() < end:
            try:
                with sole_writer(output, "compress"):
                    # Fails if another is inside.
                    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
                    alone.unlink()
                    with entered.get_lock():
                        entered.value += 1
            except OutputError as error:
                assert "is being written by" in str(error), error

    workers = [in_child(worker) for _ in range(4)]
    for child in workers:
        child.join()
    assert [child.exitcode for child in workers] == [0] * 4
    assert entered.value > 20
    if file_system == "locks":
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_another_user_is_told_too(file_system: str) -> None:
    said = FORK.SimpleQueue()

    def second(folder: str) -> None:
        os.seteuid(65534)
        try:
            with sole_writer(Path(folder) / "out", "compress"):
                said.put("")
        except OutputError as error:
            said.put(str(error))

    # Not below tmp_path: other users cannot enter that.
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        process = holding(Path(folder) / "out")
        in_child(lambda: second(folder)).join()
        kill(process)
        assert f"(pid {process} on " in said.get()
        in_child(lambda: second(folder)).join()
        remedy = "another user's run has left it, remove it"
        remedy = remedy if file_system == "locks" else "if it is over, delete "
        assert remedy in said.get()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "out.camera-lock").symlink_to(tmp_path / "thesis")
    with (
        pytest.raises(OutputError, match=r"out\.camera-lock cannot be created"),
        sole_writer(tmp_path / "out", "compress"),
    ):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_lock_of_another_machine_without_locks_names_the_file_to_delete(
    tmp_path: Path, file_system: str
) -> None:
    if file_system == "locks":
        pytest.skip("the kernel knows")
    (tmp_path / "out.camera-lock.held").write_text("4711\nelsewhere\n")
    with (
        pytest.raises(OutputError, match=r"if it is over, delete .*/out\.camera-lock\.held\)"),
        sole_writer(tmp_path / "out", "compress"),
    ):
        pass


def test_where_nothing_can_be_created_is_said_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"x\.camera-lock cannot be created: .*another output"),
        sole_writer(Path("/proc/x"), "compress"),
    ):
        pytest.fail("nothing can be written there")
