"""Rules of the project that no other tool checks: who imports whom, and how long functions are."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("camera_serve", "converters", "bench")
LONGEST_FUNCTION = 80
MEDIAN_FUNCTION = 15


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """Top-level packages a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def forbidden_imports(path: Path) -> set[str]:
    """What a file must not import: each outer layer may know its own tool and no other's."""
    part = path.relative_to(ROOT).parts
    if part[0] == "converters":
        return {"vllm", "click", "bench"}
    if part[1] == "cli":
        return {"vllm", "bench"}
    if part[1] == "vllm_plugin":
        return {"click", "converters", "bench"}
    return {"vllm", "click", "converters", "bench"}


@pytest.mark.parametrize(
    "path", sources("camera_serve", "converters"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_inwards(path: Path) -> None:
    assert not imported_packages(path) & forbidden_imports(path)


def function_lengths() -> Iterator[tuple[int, str]]:
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_functions_are_short() -> None:
    lengths = sorted(function_lengths(), reverse=True)
    assert lengths[0][0] <= LONGEST_FUNCTION, lengths[:5]
    assert statistics.median(length for length, _ in lengths) <= MEDIAN_FUNCTION


def test_fresh_memory_is_poisoned() -> None:
    x = torch.ones(2)
    for fresh in (torch.empty(3), torch.empty_like(x), x.new_empty(3), x.bfloat16().new_empty(3)):
        assert fresh.isnan().all()


def test_requirements_are_pinned_and_name_no_host() -> None:
    for path in (ROOT / ".ci").glob("*-requirements.txt"):
        for line in path.read_text().splitlines():
            name, separator, version = line.partition("==")
            assert name and separator and version, f"{path.name}: {line}"
            assert "://" not in line, f"{path.name}: {line}"
