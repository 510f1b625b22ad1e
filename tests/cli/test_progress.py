"""Progress on stderr: plain lines in a log, a bar on a terminal."""

import io
import signal
import sys

import pytest

from camera_serve.cli.progress import shown_progress
from camera_serve.progress import Progress

REPORTS = (
    Progress("compress", 0, 28, 0.4, None, 2**30),
    Progress("compress", 7, 28, 70.0, 210.0, 3 * 2**29),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_plain_line_per_layer(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as on_progress:
        for report in REPORTS:
            on_progress(report)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "compress  0/28 layers  0 s, peak memory 1.0 GiB",
        "compress  7/28 layers  1 min 10 s, 3 min 30 s left, peak memory 1.5 GiB",
    ]


def test_a_log_of_bytes_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as on_progress:
        for second in range(41):
            left = 40.0 - second if second else None
            on_progress(Progress("hash", second * 2**30, 40 * 2**30, second, left, 2**30, "bytes"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        *("0 B of 40.0 GiB", "10.0 GiB of 40.0 GiB", "20.0 GiB of 40.0 GiB"),
        *("30.0 GiB of 40.0 GiB", "40.0 GiB of 40.0 GiB"),
    ]
    assert lines[1] == "hash  10.0 GiB of 40.0 GiB  10 s, 30 s left, peak memory 1.0 GiB"


def test_a_report_raises_the_interrupt_that_a_library_swallowed() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), shown_progress() as on_progress:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            on_progress(REPORTS[0])
            pytest.fail("the report passed")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminal_gets_a_bar_with_time_left_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress() as on_progress:
        for report in REPORTS:
            on_progress(report)
    shown = terminal.getvalue()
    assert "7/28" in shown
    assert "3 min 30 s left, peak memory 1.5 GiB" in shown
    assert "\x1b[" in shown
    assert capsys.readouterr().out == ""
