"""Rules of the project that no other tool checks: who imports whom, and how long functions are."""

import ast
import re
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import camera_serve

ROOT = Path(__file__).parents[1]
PACKAGES = ("camera_serve", "converters", "bench")
LONGEST_FUNCTION = 80
MEDIAN_FUNCTION = 15


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Modules a file imports, inside functions too; of `from a.b import c`, `a.b` and `a.b.c`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_packages(path: Path) -> set[str]:
    """What a file must not import: each outer layer may know its own tool and no other's."""
    if room_of(path) == "cli":
        return {"vllm", "bench"}
    if room_of(path) == "vllm_plugin":
        return {"click", "bench"}
    return {"vllm", "click", "bench"}


def room_of(path: Path) -> str:
    """The folder, or the module, of a package that a file belongs to: a room of its layers."""
    part = path.relative_to(ROOT).with_suffix("").parts
    return part[0] if part[0] == "converters" else part[1]


def rooms_imported(path: Path, package: str) -> set[str]:
    parts = [name.split(".") for name in imported_modules(path)]
    rooms = {part[1] for part in parts if part[0] == package and len(part) > 1}
    return {room for room in rooms if (ROOT / package / room).is_dir() or room in ROOMS[package]}


LAYERS = {
    "camera_serve": (
        {"cli"},
        {"compression", "evaluation", "benchmark", "converters"},
        {"ranking"},
        {"calibration"},
        {"hf", "vllm_plugin"},
        {"checkpoint"},
        {"kernels"},
        {"ragged"},
        {"models", "recipe"},
        {"progress", "runtime"},
        {"errors"},
    ),
    "bench": (
        {"demo", "summary"},
        {"gpu"},
        {"quality", "speed"},
        {"shapes", "reference_moe"},
        {"coverage", "data_flow"},
        {"stored"},
        {"reference"},
    ),
}
"""Who may import whom: a room those of the layers below it, and no other of its own layer."""

ROOMS = {package: set().union(*layers) for package, layers in LAYERS.items()}


def package_files() -> list[tuple[str, Path]]:
    """All files with the package of their rooms; a package's own `__init__.py` is in none."""
    homes = {"camera_serve": "camera_serve", "converters": "camera_serve", "bench": "bench"}
    return [
        (package, path)
        for folder, package in homes.items()
        for path in sources(folder)
        if path != ROOT / package / "__init__.py"
    ]


@pytest.mark.parametrize(
    ("package", "path"), package_files(), ids=lambda value: str(value).removeprefix(f"{ROOT}/")
)
def test_imports_point_down(package: str, path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS[package], f"{path}: {room} has no place in LAYERS"
    own = next(layer for layer in LAYERS[package] if room in layer)
    below = set().union(*LAYERS[package][LAYERS[package].index(own) + 1 :])
    assert rooms_imported(path, package) <= below | {room}


@pytest.mark.parametrize(
    "path", sources("camera_serve", "converters"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_each_layer_knows_its_own_tool_alone(path: Path) -> None:
    found = {name.split(".")[0] for name in imported_modules(path)}
    assert not found & forbidden_packages(path)


def test_every_folder_says_what_goes_in_and_what_comes_out() -> None:
    folders = {path.parent for path in sources(*PACKAGES)}
    for folder in folders:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring, f"{folder}/__init__.py says nothing"


def test_no_folder_hides_a_public_function() -> None:
    rooms = ROOMS["camera_serve"]
    assert not rooms & set(camera_serve.__all__)


def test_the_wheel_installs_every_package_under_one_name() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in sources("camera_serve")}
    assert set(settings["packages"]) == {
        "camera_serve.converters",
        *(".".join(folder.parts) for folder in folders),
    }


def test_what_is_not_yet_released_has_a_version_of_its_own() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest, *_ = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = re.findall(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = Version(settings["version"])
    if newest == "Not yet released":
        assert version.is_devrelease and version > Version(released[0])
    else:
        assert version == Version(newest)


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
