"""Reading ahead, with reads that wait until the test lets them go on."""

import threading
import weakref
from collections.abc import Callable

import pytest

from camera_serve.calibration.prefetch import reading_ahead
from camera_serve.errors import DamagedWeightsError

PATIENCE = 10.0


class Gated:
    """A read that notes when it began and ends when its gate is opened."""

    def __init__(self, numbers: range) -> None:
        self.begun = {number: threading.Event() for number in numbers}
        self.gates = {number: threading.Event() for number in numbers}

    def __call__(self, number: int) -> str:
        self.begun[number].set()
        assert self.gates[number].wait(PATIENCE)
        return f"layer {number}"


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("camera-read-ahead")]


def test_items_come_in_order() -> None:
    with reading_ahead(lambda number: number**2, range(3, 6)) as take:
        assert [take() for _ in range(3)] == [9, 16, 25]


def test_the_next_item_is_under_way_while_the_present_one_is_used() -> None:
    read = Gated(range(3))
    with reading_ahead(read, range(3)) as take:
        read.gates[0].set()
        assert take() == "layer 0"
        assert read.begun[1].wait(PATIENCE)
        assert not read.begun[2].is_set()
        read.gates[1].set()
        assert take() == "layer 1"
        assert read.begun[2].wait(PATIENCE)
        read.gates[2].set()
        assert take() == "layer 2"


def test_two_items_are_alive_at_most() -> None:
    class Layer:
        pass

    alive: weakref.WeakSet[Layer] = weakref.WeakSet()
    counts: list[int] = []
    done = [threading.Event() for _ in range(20)]

    def read(number: int) -> Layer:
        layer = Layer()
        alive.add(layer)
        counts.append(len(alive))
        done[number].set()
        return layer

    def use(number: int, take: Callable[[], Layer]) -> None:
        held = take()
        # Held until the next one is there too.
        assert held and done[min(number + 1, 19)].wait(PATIENCE)

    with reading_ahead(read, range(20)) as take:
        for number in range(20):
            use(number, take)
    assert max(counts) == 2


def test_an_error_comes_with_its_own_item_and_its_own_type() -> None:
    def read(number: int) -> int:
        if number == 1:
            raise DamagedWeightsError("layer 1 holds 3 NaN")
        return number

    with reading_ahead(read, range(3)) as take:
        assert take() == 0
        with pytest.raises(DamagedWeightsError, match="layer 1 holds 3 NaN"):
            take()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_early_stop_leaves_nothing_running(error: type[BaseException]) -> None:
    read = Gated(range(9))
    with pytest.raises(error), reading_ahead(read, range(9)) as take:
        read.gates[0].set()
        take()
        assert read.begun[1].wait(PATIENCE) and len(readers()) == 1
        read.gates[1].set()
        raise error
    assert readers() == []
    assert not read.begun[2].is_set()


def test_nothing_to_read_starts_nothing() -> None:
    with reading_ahead(lambda number: number, range(0)):
        assert readers() == []
