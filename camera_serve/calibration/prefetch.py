"""Reading ahead: the next item is read in a thread while the present one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def reading_ahead(
    read: Callable[[int], Item], numbers: Iterable[int]
) -> Iterator[Callable[[], Item]]:
    """A function whose calls give `read(number)` in turn, always with the next one under way.

    Two items are in memory at most, if each is dropped before the next is asked for. A call raises
    what reading its own item raised. Leaving waits for a read under way and starts no other.
    """
    rest, pending = iter(numbers), list[Future[Item]]()

    def request() -> None:
        pending.extend(pool.submit(read, number) for number in islice(rest, 1))

    def take() -> Item:
        item = pending.pop().result()
        request()
        return item

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="camera-read-ahead")
    try:
        request()
        yield take
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
