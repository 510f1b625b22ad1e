"""One output, one writer: a lock beside the output, which the kernel frees when its holder dies."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import SoftFileLock, Timeout
from pydantic import ValidationError

from camera_serve.errors import OutputError
from camera_serve.recipe import Settings

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_ATTEMPTS = 100
_held: set[int] = set()


class Owner(Settings):
    """The run that writes an output, as it stands in the lock for whoever finds it taken."""

    command: str
    pid: int
    host: str
    since: str


@contextmanager
def sole_writer(output: Path, command: str) -> Iterator[None]:
    """Keep all other runs from writing `output`, a folder or a file; it need not exist.

    The lock is a `flock` on `OUTPUT.camera-lock`. The file goes when the run ends; a killed run
    leaves it behind unlocked, and the next one takes it. Where the file system has no locks,
    `OUTPUT.camera-lock.held` is the lock while it exists: left behind, the next run on the same
    machine takes it over, on another machine a person has to delete it. Raises `OutputError`
    that names the holder.
    """
    output = output.resolve()
    path = output.with_name(output.name + ".camera-lock")
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        descriptor, marker = _acquire(path, output)
        try:
            _sign(descriptor, path, command)
            yield
        finally:
            _release(path, descriptor, marker)
    finally:
        for folder in missing:
            # Those that hold an output stay.
            with suppress(OSError):
                folder.rmdir()


def now() -> str:
    """This second, in local time with its offset, for people to read."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _acquire(path: Path, output: Path) -> tuple[int, SoftFileLock | None]:
    """A locked descriptor of the file at `path`, and the lock that stands in for one."""
    missing = None
    for _ in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path)
        except FileNotFoundError as error:
            # Another run has just removed the folders it had made, or this is no real folder.
            missing = error
            continue
        except OSError as error:
            raise _uncreated(path, error) from error
        _held.add(descriptor)
        try:
            marker = _lock(descriptor, path, output)
        except BaseException:
            _close(descriptor)
            raise
        if _lies_at(descriptor, path):
            return descriptor, marker
        # The run that held it ended between our open and our lock, and took its name away.
        _release(path, descriptor, marker)
    if missing:
        raise _uncreated(path, missing)
    raise OutputError(f"{path} was removed {_ATTEMPTS} times while it was being locked: try again")


def _uncreated(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be created: {error.strerror}: choose another output, in a folder that can "
        "be written"
    )


def _open(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        # Another user's: it can be read who that is, and asked whether they still hold it.
        return os.open(path, os.O_RDONLY | flags)


def _sign(descriptor: int, path: Path, command: str) -> None:
    owner = Owner(command=command, pid=os.getpid(), host=socket.gethostname(), since=now())
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): if another user's run has left it, "
            "remove it, or choose another output"
        ) from error


def _lock(descriptor: int, path: Path, output: Path) -> SoftFileLock | None:
    """Lock the open file, without waiting; what stands in where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OutputError(_busy(output, descriptor)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"{path} cannot be locked: {error.strerror}") from error
        marker = SoftFileLock(f"{path}.held", timeout=0, thread_local=False)
        try:
            marker.acquire()
        except Timeout:
            hint = f" (if it is over, delete {path}.held)"
            raise OutputError(_busy(output, descriptor) + hint) from error
        return marker
    return None


def _release(path: Path, descriptor: int, marker: SoftFileLock | None) -> None:
    if descriptor not in _held:
        # A forked child: the lock is its parent's.
        return
    if _lies_at(descriptor, path):
        # The output is there: a name that cannot be removed is no failure.
        with suppress(OSError):
            path.unlink()
    if marker:
        marker.release()
    _close(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _close_inherited() -> None:
    """In a forked child, which would keep the lock when its parent is killed."""
    for descriptor in list(_held):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_inherited)


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _busy(output: Path, descriptor: int) -> str:
    """Who holds the lock; its holder writes that a moment after it has locked."""
    who = "another run"
    for _ in range(20):
        time.sleep(0.05)
        with suppress(ValidationError):
            owner = Owner.model_validate_json(os.pread(descriptor, 4096, 0))
            since = f"since {owner.since}"
            who = f"camera-serve {owner.command} (pid {owner.pid} on {owner.host}, {since})"
            break
    return f"{output} is being written by {who}: wait for it, stop it, or choose another output"
