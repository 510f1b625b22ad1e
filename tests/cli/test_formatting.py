"""Numbers as people read them."""

import pytest

from camera_serve.cli.formatting import human_bytes, human_seconds, percent, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (114 * 2**30, "114.0 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7860, "2 h 11 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_percent() -> None:
    assert percent(0.39474) == "39.5%"


def test_table_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("a", "long"), [(1, 2), (333, "x")]) == "  a  long\n  1     2\n333     x"
