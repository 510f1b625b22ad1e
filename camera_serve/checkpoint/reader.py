"""A checkpoint on disk: config, MoE structure, lazily read safetensors, checked before any work."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from camera_serve.checkpoint.files import (
    INDEX,
    is_left_out,
    refuse_pointers,
    side_files,
)
from camera_serve.checkpoint.format import (
    LOST,
    MARKER,
    MARKER_FILE,
    CameraQuantizationConfig,
    Shapes,
    checkpoint_shapes,
)
from camera_serve.checkpoint.report import REPORT_FILE, CompressionReport
from camera_serve.errors import (
    CheckpointError,
    DamagedWeightsError,
    UnsupportedModelError,
    described,
    first_line,
    naming,
)
from camera_serve.models import MoeStructure, describe
from camera_serve.models.families import FAMILIES, MOST, require_transformers
from camera_serve.models.registration import register_configs
from camera_serve.models.storage import Index, are_transposed, logical_tensors
from camera_serve.recipe import describe_errors

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
}

_DEPTHS = ("num_hidden_layers", "depth")
"""Settings that say how many layers there are, in a text part and in one that sees pictures."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is, from the safetensors header alone.

    It is `stored[index]` of the tensor named `stored` in `file`, or the transpose of that; all of
    it when `index` is empty.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored: str
    index: Index = ()
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder of a supported MoE model, dense or compressed.

    `raw_config` is config.json as it stands; `quantization` is None for a dense checkpoint.
    `entries` are logical tensors (`camera_serve.models.storage`), however the files store them.
    """

    path: Path
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    structure: MoeStructure
    quantization: CameraQuantizationConfig | None
    entries: Mapping[str, TensorEntry]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read config and headers and compare every name and shape with what the config implies.

        Raises `CheckpointError` naming the first file or tensor at fault, `UnsupportedModelError`
        for a model that is not understood.
        """
        checkpoint = cls.open_unchecked(path)
        checkpoint.check_tensors()
        return checkpoint

    @classmethod
    def open_unchecked(cls, path: Path) -> Self:
        """Like `open`, without comparing tensors to the config."""
        raw = read_json(path / "config.json")
        with naming(path / "config.json"):
            quantization = _quantization(raw)
            if quantization is None and _is_marked(path):
                raise CheckpointError(LOST)
            config = load_config(path, raw)
            structure = describe(config)
            if quantization:
                quantization.check(structure)
        weights = _weight_files(path)
        refuse_pointers(path, [*weights, *(path / file for file in side_files(path))])
        entries = read_headers(weights)
        if quantization is None:
            entries = logical_entries(entries, structure, path)
        return cls(path, raw, config, structure, quantization, entries)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in, as config.json says (bfloat16 when it does not)."""
        found = self.config.dtype or self.config.get_text_config().dtype or torch.bfloat16
        return found if isinstance(found, torch.dtype) else getattr(torch, str(found))

    @cached_property
    def expected_shapes(self) -> Shapes:
        """Every tensor config.json asks for."""
        with naming(self.path / "config.json"):
            return checkpoint_shapes(self.config, self.structure, self.quantization)

    @cached_property
    def expert_names(self) -> frozenset[str]:
        """Names of all expert tensors, shared experts included."""
        return frozenset(name for name in self.entries if self.structure.is_expert(name))

    @cached_property
    def carried_names(self) -> frozenset[str]:
        """Names of tensors that config.json does not ask for: draft layers, a vision tower."""
        return frozenset(self.entries.keys() - self.expected_shapes.keys())

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert weights, shared experts included."""
        return sum(self.entries[name].num_bytes for name in self.expert_names)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def check_tensors(self) -> None:
        """Refuse a missing, misshapen or unknown tensor, by name."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        check_shapes(shapes, self.expected_shapes, self.structure, self.path)
        self._check_index()
        for name, entry in self.entries.items():
            wanted = stored_dtypes(name)
            if entry.dtype not in wanted:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is stored as {entry.dtype}, wanted "
                    f"{' or '.join(wanted)}"
                )

    def _check_index(self) -> None:
        """Refuse an index of other tensors: config.json knows nothing of those that are carried."""
        index = self.path / INDEX
        if not index.exists():
            return
        stored = {entry.stored for entry in self.entries.values()}
        for name, file in _weight_map(index).items():
            if name not in stored:
                raise CheckpointError(
                    f"{self.path / file}: tensor {name} is missing, and {INDEX} names it: copy "
                    "both files again from where they came from"
                )

    def require_dense(self) -> None:
        """Refuse a checkpoint that is compressed already."""
        if self.quantization:
            raise CheckpointError(
                f"{self.path} is already compressed (plan {self.quantization.recipe.plan}): start "
                "from its original model"
            )

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU, in its stored dtype; NaN or Inf raise `CheckpointError`."""
        entry = self.entries[name]
        try:
            tensor = self._handle(entry.file).get_slice(entry.stored)[entry.index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: {name} cannot be read: {error}") from error
        if name.endswith(".scales") and not (tensor > 0).all():
            bad = int((~(tensor > 0)).sum())
            raise DamagedWeightsError(
                f"{entry.file}: {name} holds {bad} scales of {tensor.numel()} that are not "
                "positive: the file is damaged; copy or compress the checkpoint again"
            )
        if not _all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DamagedWeightsError(
                f"{entry.file}: {name} holds {bad} NaN or Inf values of {tensor.numel()}: copy the "
                "file again from where it came from, or repair the weights"
            )
        return tensor.mT if entry.transposed else tensor

    def release(self) -> None:
        """Unmap the weight files: pages once read count as this process's memory until then."""
        self._handles.clear()

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]


def load_config(path: Path, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """config.json as a transformers config, DeepSeek v1 included, without remote code.

    raw: what it holds. Raises `UnsupportedModelError` for a model type nobody here knows,
    `CheckpointError` with transformers' reason for a config that it refuses.
    """
    register_configs()
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("names no model_type")
    _refuse_countless_layers(raw)
    require_transformers(model_type)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers checks few settings: the rest fails in its code.
        if model_type in FAMILIES:
            raise CheckpointError(f"transformers refuses it: {described(error)}") from error
        raise UnsupportedModelError(
            f"model type {model_type!r} is not understood: {first_line(error)}"
        ) from error


def _refuse_countless_layers(raw: Mapping[str, Any]) -> None:
    """Of the text model or of a part beside it: transformers would list, or make, them all."""
    for key in _DEPTHS:
        layers = raw.get(key)
        if isinstance(layers, int | float) and layers > MOST:
            raise CheckpointError(f"{key} is {layers}: wanted 1 to {MOST}")
    for value in raw.values():
        if isinstance(value, dict):
            _refuse_countless_layers(value)


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf: both show in the extremes, which are found far faster."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` when it is missing or not one.

    Refused is what others would read in another way: NaN, and a key with two values.
    """
    refuse_pointers(path.parent, [path])
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_one_value_per_key,
            parse_constant=_no_number,
        )
        # What JSON can spell and no number or file can hold: 1e999, half a surrogate pair.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: this is not a model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, wanted a JSON object")
    return data


def _one_value_per_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data and data[key] != value:
            raise ValueError(f"{key!r} has two values: {data[key]!r:.100} and {value!r:.100}")
        data[key] = value
    return data


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def read_report(folder: Path) -> CompressionReport | None:
    """The report in a checkpoint's folder, if there is one.

    Raises `CheckpointError` for a file that is none.
    """
    file = folder / REPORT_FILE
    if not file.exists():
        return None
    try:
        return CompressionReport.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(
            f"{file} is no report of camera-serve compress: {describe_errors(error)}; remove it, "
            "or compress the model again"
        ) from error


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Every tensor that safetensors files store, without reading weights.

    Raises `CheckpointError` for a truncated or non-safetensors file, a tensor of an unknown dtype,
    or a tensor that two files hold.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise CheckpointError(f"{name} is in both {entries[name].file} and {file}")
            entries[name] = entry
    return entries


def logical_entries(
    stored: Mapping[str, TensorEntry], structure: MoeStructure, path: Path
) -> dict[str, TensorEntry]:
    """What the stored tensors of an original hold, by the names of the original format.

    Raises `CheckpointError` for experts stored in both forms, a tensor stored twice, or fused
    experts of another shape.
    """
    transposed = are_transposed({name: entry.shape for name, entry in stored.items()}, structure)
    found = [
        (part.name, replace(entry, shape=part.shape, index=part.index, transposed=part.transposed))
        for entry in stored.values()
        for part in logical_tensors(entry.stored, entry.shape, entry.file, structure, transposed)
    ]
    experts = (part for name, part in found if structure.is_routed_expert(name))
    forms = {bool(part.index): part.stored for part in experts}
    if len(forms) == 2:
        raise CheckpointError(
            f"{path} stores experts both as {forms[True]} (fused) and as {forms[False]}: download "
            "it or save it again, in one form"
        )
    entries: dict[str, TensorEntry] = {}
    for name, part in found:
        if name in entries:
            raise CheckpointError(
                f"{path} stores one tensor twice: as {entries[name].stored} in "
                f"{entries[name].file.name} and as {part.stored} in {part.file.name}: remove one"
            )
        entries[name] = part
    return entries


def stored_dtypes(name: str) -> tuple[str, ...]:
    """The dtypes a tensor may have: packed codes are int32, their grids float16, weights floats."""
    packed = {"qweight": ("I32",), "scales": ("F16",), "zeros": ("F16",)}
    floats = tuple(dtype for dtype in DTYPES if dtype != "I32")
    return packed.get(name.rpartition(".")[2], floats)


def check_shapes(found: Shapes, wanted: Shapes, structure: MoeStructure, path: Path) -> None:
    """Compare tensor names and shapes with what a config implies.

    Raises `CheckpointError` naming the first at fault. Tensors that the model itself does not load
    may be there: rotary tables, tied heads, layers past the last one, other models' parts.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor {name} {list(shape)} is missing")
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found[name])}, config.json implies "
                f"{list(shape)}"
            )
    extra = [name for name in found if name not in wanted and not _may_be_there(name, structure)]
    if extra:
        raise CheckpointError(
            f"{path}: tensor {sorted(extra)[0]} is not part of this model as config.json describes "
            f"it ({len(extra)} such tensors)"
        )


def _may_be_there(name: str, structure: MoeStructure) -> bool:
    # `mtp.fc.weight` and `model.visual.…` have no place in the stack of layers, `model.` here.
    stack = structure.layer_prefix(0).removesuffix("layers.0")
    if not name.startswith((stack, "lm_head.")):
        return True
    tied = structure.to_hf_name(name) == "lm_head.weight"
    elsewhere = name.startswith(structure.family.elsewhere)
    alone = tied or elsewhere or name.endswith("rotary_emb.inv_freq")
    return alone or structure.is_left_out(name)


def _is_marked(path: Path) -> bool:
    """Whether `compress` wrote this folder, whatever its config.json says now."""
    marker = path / MARKER_FILE
    return marker.is_file() and read_json(marker) == MARKER


def _quantization(raw: Mapping[str, Any]) -> CameraQuantizationConfig | None:
    data = raw.get("quantization_config")
    if data is None:
        return None
    method = data.get("quant_method") if isinstance(data, dict) else data
    if method != "camera":
        raise UnsupportedModelError(
            f"the model is already quantized with {method!r}: start from its 16-bit checkpoint"
        )
    return CameraQuantizationConfig.parse(data)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder that hold its model, by its index where it has one.

    Raises `CheckpointError` for one that is missing, and where it is not clear which they are.
    """
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path / INDEX).values()))
        for name in names:
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name} is missing: {INDEX} names it")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    # Copies of the weights in another format may lie beside them, and adapters.
    files = [file for file in found if not is_left_out(file.name)]
    if not files:
        others = [file.name for file in found]
        raise CheckpointError(f"{path} holds no safetensors file{_other_weights(path, others)}")
    if len(files) > 1:
        raise CheckpointError(f"{path} has {len(files)} safetensors files but no {INDEX}")
    return files


def _other_weights(path: Path, others: list[str]) -> str:
    """What a folder has instead of weights that can be read, and what to do."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pt") for file in path.glob(kind))
    if pickled:
        return f"; it has pickled weights ({pickled[0]}): convert them to safetensors"
    if others:
        return f" of a whole model in the Hugging Face format, only {others[0]}: download that"
    return ""


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(f"{index} holds no weight_map of plain file names")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            entries = {
                name: TensorEntry(file, tuple(part.get_shape()), part.get_dtype(), name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again from where it "
            "came from"
        ) from error
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{file}: {name} is stored as {entry.dtype}; wanted one of {', '.join(DTYPES)}: "
                "start from the 16-bit checkpoint"
            )
    return entries
