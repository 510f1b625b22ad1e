"""What benchmarks keep: where they ran, and their tables in README.md and docs/."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from bench import reference
from camera_serve.benchmark.environment import Environment
from camera_serve.errors import CameraError

README = reference.ROOT / "README.md"
DOCS = reference.ROOT / "docs"


def environment() -> dict[str, Any]:
    """What the figures depend on besides the model: machine, versions, commit."""
    found = Environment.here(os.environ)
    return {
        "cpu": found.cpu,
        "threads": torch.get_num_threads(),
        "python": found.python,
        **{name: found.packages[name] for name in ("camera-serve", "torch", "transformers")},
        "commit": found.commit,
    }


def stored(path: Path, version: int) -> dict[str, Any]:
    """A result that this version of its benchmark can read."""
    result: dict[str, Any] = json.loads(path.read_text())
    if result["version"] != version:
        raise SystemExit(f"{path} has version {result['version']}, wanted {version}")
    return result


def put_in_page(page: Path, name: str, table: str) -> None:
    """Put a table between its markers in a page; raises `CameraError` when it lacks them."""
    page.write_text(with_table(page.read_text(), name, table))


def with_table(page: str, name: str, table: str) -> str:
    """A page with `table` between the markers `name:start` and `name:end`.

    Raises `CameraError` when it does not have both.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise CameraError(f"the page has no place for this table: put {start} and {end} in it")
    return f"{before}{start}\n{table}\n{end}{after}"
