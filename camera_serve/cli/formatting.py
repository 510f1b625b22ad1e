"""Numbers as people read them."""

from collections.abc import Mapping


def human_bytes(count: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """`12 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def percent(share: float) -> str:
    """`40.0%`."""
    return f"{100 * share:.1f}%"


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Right-aligned columns, two spaces apart, as narrow as their widest cell."""
    cells = [header, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(lines)


def skipped_line(skipped: Mapping[str, int]) -> str:
    """What was left out of the calibration text: `skipped 3 rows without text`."""
    parts = (
        f"{count:,} {what.replace('s ', ' ', 1) if count == 1 else what}"
        for what, count in skipped.items()
    )
    return f"calibration text: skipped {', '.join(parts)}"
