"""Interrupts that a library loses on the way."""

import signal
from collections.abc import Iterator

import pytest

from camera_serve.cli.interrupts import interrupts_kept


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    found = signal.signal(signal.SIGINT, before)
    assert found is signal.default_int_handler, "the handler was not put back"


def lose_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_raised_where_it_comes() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        signal.raise_signal(signal.SIGINT)


def test_an_error_after_the_interrupt_is_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as found, interrupts_kept():
        lose_interrupt()
        raise ValueError("could not determine the shape")
    assert isinstance(found.value.__cause__, ValueError)


def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_check() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept() as check:
        check()
        lose_interrupt()
        check()


def test_an_interrupt_that_was_swallowed_is_raised_at_the_end_at_last() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        lose_interrupt()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="a mistake"), interrupts_kept():
        raise ValueError("a mistake")


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_kept() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
