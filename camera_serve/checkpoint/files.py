"""The files of a model's folder beside its weights, and files that are Git LFS pointers.

A copy of the model gets all of them but what is listed here: tokenizers, processors and engines
read files under more names than one could list.
"""

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from camera_serve.checkpoint.report import CONVERSION_FILE, REPORT_FILE
from camera_serve.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
RECIPE_FILE = "camera_recipe.yaml"
LOG_FILE = "camera.log"

WRITTEN_ANEW = {"config.json", "README.md", REPORT_FILE, CONVERSION_FILE, RECIPE_FILE, LOG_FILE}
"""Files of the folder itself that are made for each checkpoint, or by one command alone."""

WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.distcp"),
    *("*.gguf", "*.onnx", "*.onnx_data*", "*.tflite", "*.nemo", "*.npy", "*.npz", "*.pkl"),
    *("*.pickle", "*.zip", "*.tar", "*.tar.*", "*.tgz"),
)
ABOUT_WEIGHTS = (
    *("*.index.json", "*.index.*.json", "consolidated*", "params.json", "adapter_*"),
    *("*quant*_config.json", "torchao_config.json"),
)
"""What describes weights of another format: engines that find it look for those weights."""

CODE = ("*.py", "*.pyc", "*.so", "*.sh", "*.ipynb")
FOR_READERS = (
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf"),
    *("*.mp3", "*.mp4", "*.wav", "*.flac"),
)
HIDDEN = ".*"
"""Version control and download caches."""

_NEVER = (HIDDEN, *ABOUT_WEIGHTS, *CODE, *FOR_READERS)

_BUT_WHAT_A_MODEL_NEEDS = {
    # Without `model.safetensors.index.json` nobody knows which files are the model's.
    "*.index.json": ("*[!s].index.json",),
    # `hf_quant_config.json` is one of the files that `compress` writes, and `verify` looks for.
    "*quant*_config.json": ("[!h]*quant*_config.json", "quant*_config.json"),
}
"""Narrower patterns for those that take in a file of the model itself."""

NOT_DOWNLOADED = (
    *(
        pattern
        for name in _NEVER
        for narrower in _BUT_WHAT_A_MODEL_NEEDS.get(name, (name,))
        for pattern in (narrower, f"*/{narrower}")
    ),
    # Folders of sentence-transformers start with a number, and their weights belong to the model.
    *(f"[!0-9]{name}" for name in WEIGHTS if name != "*.safetensors"),
)
"""Of a model on the hub; here `*` stands for folders too."""

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
"""Bytes, by the specification of Git LFS."""


def side_files(folder: Path) -> list[Path]:
    """The files that every copy of the model gets, relative to `folder`, subfolders included.

    Left out are `WEIGHTS` and what is `ABOUT_WEIGHTS` that a copy has not, `CODE`, what is
    `FOR_READERS`, `HIDDEN` files and what is `WRITTEN_ANEW`. A subfolder with weights is another
    model and left out as a whole, unless modules.json names it as a part of this one. Links count
    as what they point to.
    """
    parts = _module_folders(folder)
    outside = frozenset(folder.resolve().parents)
    found = _files_below(folder, Path(), parts, outside)
    return sorted(file for file in found if str(file) not in WRITTEN_ANEW)


def refuse_pointers(folder: Path, files: Iterable[Path]) -> None:
    """Raise `CheckpointError` naming the files that are Git LFS pointers.

    A clone without git-lfs holds them in place of large files.
    """
    pointers = [str(file.relative_to(folder)) for file in files if _is_pointer(file)]
    if pointers:
        more = f" and {len(pointers) - 3} more" if len(pointers) > 3 else ""
        raise CheckpointError(
            f"{folder} holds Git LFS pointers in place of {', '.join(pointers[:3])}{more}: run "
            "`git lfs pull` there, or download the model again"
        )


def files_like(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of these names anywhere in a model's folder, relative to it, but for hidden ones.

    Nor the weights of parts that modules.json names, which are the model's own.
    """
    own = set(side_files(folder))
    below = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    found = (file for file in below if _matches(file.name, patterns) and file not in own)
    return sorted(file for file in found if not any(_matches(p, (HIDDEN,)) for p in file.parts))


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is in no copy, wherever it lies."""
    return _matches(name, _NEVER)


def _files_below(
    folder: Path, inner: Path, parts: set[Path], above: frozenset[Path]
) -> Iterator[Path]:
    """Files of `folder / inner`, relative to `folder`; `above` are the folders it lies in."""
    try:
        entries = list((folder / inner).iterdir())
    except PermissionError:
        return  # As `lost+found` at the root of a disk: nobody else can read it either.
    weights = {entry.name for entry in entries if _matches(entry.name, WEIGHTS)}
    here = (folder / inner).resolve()
    is_part = not parts.isdisjoint({inner, *inner.parents})
    if here in above or (weights and inner != Path() and not is_part):
        return
    for entry in entries:
        if is_left_out(entry.name) or (entry.name in weights and not is_part):
            continue
        if entry.is_dir():
            yield from _files_below(folder, inner / entry.name, parts, above | {here})
        elif entry.is_file():
            yield inner / entry.name


def _module_folders(folder: Path) -> set[Path]:
    """The subfolders that modules.json of sentence-transformers names."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules = modules["modules"] if isinstance(modules, dict) else modules
        paths = {Path(module["path"]) for module in modules}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
    return paths - {Path()}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _is_pointer(file: Path) -> bool:
    try:
        if file.stat().st_size > LARGEST_POINTER:
            return False
        with file.open("rb") as content:
            return content.read(len(POINTER)) == POINTER
    except OSError:
        return False  # Whoever reads the file says what is wrong with it.
