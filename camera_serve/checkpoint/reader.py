"""A checkpoint on disk: config, MoE structure, lazily read safetensors, checked before any work."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from camera_serve.checkpoint.entries import COUNTED, DTYPES, TensorEntry
from camera_serve.checkpoint.files import (
    INDEX,
    WHOLE,
    is_left_out,
    refuse_pointers,
    side_files,
)
from camera_serve.checkpoint.format import (
    LOST,
    MARKER,
    MARKER_FILE,
    CameraQuantizationConfig,
    OutsideExperts,
    Shapes,
    checkpoint_shapes,
)
from camera_serve.checkpoint.originals import (
    StoredQuantization,
    check_experts,
    coded_entries,
    parse,
    storage_of,
)
from camera_serve.checkpoint.report import (
    CONVERSION_FILE,
    REPORT_FILE,
    CompressionReport,
    ConversionReport,
    StoredOriginal,
)
from camera_serve.errors import (
    CheckpointError,
    DamagedWeightsError,
    UnsupportedModelError,
    described,
    first_line,
    naming,
)
from camera_serve.models import MoeStructure, describe
from camera_serve.models.contradictions import check_contradictions
from camera_serve.models.coverage import REFUSED
from camera_serve.models.families import FAMILIES, MOST, require_transformers
from camera_serve.models.formats import FLOATS
from camera_serve.models.registration import register_configs
from camera_serve.models.storage import Index, are_transposed, logical_tensors
from camera_serve.recipe import describe_errors

logger = logging.getLogger(__name__)

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json may say how weights are quantized; the second is an older name."""

FOLDER_AGAIN = (
    "its files are not all of one model; download config.json and the weights again, of one "
    "revision, or compress again"
)

DRAFTS = "eh_proj.weight"
"""What joins token and hidden state in a layer past the last one: no other layer has it."""

_DEPTHS = ("num_hidden_layers", "depth")
"""Settings that say how many layers there are, in a text part and in one that sees pictures."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder of a supported MoE model, dense or compressed.

    `raw_config` is config.json as it stands; `quantization` is None for a dense checkpoint,
    `storage` for one whose weights are stored as they are.
    `entries` are logical tensors (`camera_serve.models.storage`), however the files store them.
    """

    path: Path
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    structure: MoeStructure
    quantization: CameraQuantizationConfig | None
    entries: Mapping[str, TensorEntry]
    storage: StoredQuantization | None = None
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
            quantization, storage = _quantization(raw, path)
            config = load_config(path, raw)
            structure = describe(config)
            check_contradictions(raw, config, structure)
            if quantization:
                quantization.check(structure)
        weights = _weight_files(path)
        refuse_pointers(path, [*weights, *(path / file for file in side_files(path))])
        entries = read_headers(weights)
        _check_index(path, entries)
        if storage:
            entries = coded_entries(entries, storage, _dtype(config))
        elif quantization and quantization.outside_experts:
            entries = _with_kept(entries, quantization.outside_experts, _dtype(config))
        elif quantization is None:
            _refuse_codes(entries)
        if quantization is None:
            entries = logical_entries(entries, structure, path)
        if storage:
            experts = ((n, e) for n, e in entries.items() if structure.is_expert(n))
            check_experts(experts, storage)
        return cls(path, raw, config, structure, quantization, entries, storage)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in, as config.json says (bfloat16 when it does not).

        Quantized weights are decoded into it.
        """
        return _dtype(self.config)

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
        """Bytes of all expert weights, shared experts included, decoded."""
        return sum(self.entries[name].num_bytes for name in self.expert_names)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors: of an original decoded, of an output of compress as stored."""
        entries = self.entries.values()
        return sum(e.stored_bytes if self.quantization else e.num_bytes for e in entries)

    @property
    def stored(self) -> StoredOriginal | None:
        """What the weights of a quantized original take in its files."""
        if self.storage is None:
            return None
        return StoredOriginal(
            format=self.storage.title,
            expert_bytes=sum(self.entries[name].stored_bytes for name in self.expert_names),
            total_bytes=sum(entry.stored_bytes for entry in self.entries.values()),
        )

    @property
    def weight_files(self) -> frozenset[Path]:
        """The files that tensors are read from, their scales included."""
        entries = self.entries.values()
        coded = (entry.coding.parts.values() for entry in entries if entry.coding)
        return frozenset(entry.file for entry in chain(entries, *coded))

    def check_tensors(self) -> None:
        """Refuse a missing, misshapen or unknown tensor, by name."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        check_shapes(shapes, self.expected_shapes, self.structure, self.path)
        for name, entry in self.entries.items():
            wanted = stored_dtypes(name)
            if name not in self.expected_shapes:
                wanted += COUNTED
            if entry.dtype not in wanted:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is stored as {entry.dtype}, wanted "
                    f"{' or '.join(wanted)}"
                )

    def require_dense(self) -> None:
        """Refuse a checkpoint that is compressed already."""
        if self.quantization:
            raise CheckpointError(
                f"{self.path} is already compressed (plan {self.quantization.recipe.goal}): start "
                "from its original model"
            )

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU; NaN or Inf raise `CheckpointError`.

        In its stored dtype, or decoded into the checkpoint's where it is stored quantized.
        """
        entry = self.entries[name]
        tensor = self._decoded(name, entry) if entry.coding else self._read(entry, entry.index)
        if name.endswith(".scales"):
            _refuse_scales(entry.file, name, tensor, "copy or compress the checkpoint again")
        if not _all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DamagedWeightsError(
                f"{entry.file}: {name} holds {bad} NaN or Inf values of {tensor.numel()}: copy the "
                "file again from where it came from, or repair the weights"
            )
        return tensor.mT if entry.transposed else tensor

    def read(self, part: TensorEntry) -> torch.Tensor:
        """One stored tensor, whole and as it is: for the parts of a weight that is not decoded."""
        return self._read(part, ())

    def _decoded(self, name: str, entry: TensorEntry) -> torch.Tensor:
        """A weight of an original that is stored quantized."""
        coding = entry.coding
        assert coding
        format_ = coding.format
        parts = {
            suffix: self._read(
                part,
                entry.index if suffix == format_.codes else _of_an_expert(entry, suffix, part),
            )
            for suffix, part in coding.parts.items()
        }
        if "_shape" in parts and parts["_shape"].tolist() != list(coding.shape):
            raise DamagedWeightsError(
                f"{entry.file}: {coding.parts['_shape'].stored} says that {name} has shape "
                f"{parts['_shape'].tolist()}, its other parts {list(coding.shape)}: the file is "
                "damaged; download it again"
            )
        scales = format_.scales(parts)
        for suffix, scale in scales.items():
            part = coding.parts[suffix]
            zero = suffix in format_.zero_scales
            _refuse_scales(part.file, part.stored, scale, "download the file again", zero=zero)
        rows = entry.index[1:]
        first_row = rows[0].start if rows and isinstance(rows[0], slice) else 0
        decoded = format_.decode({**parts, **scales}, first_row)
        return decoded.to(DTYPES[entry.dtype])

    def _read(self, entry: TensorEntry, index: Index) -> torch.Tensor:
        """A part of a tensor as it is stored."""
        try:
            return self._handle(entry.file).get_slice(entry.stored)[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{entry.file}: {entry.stored} cannot be read: {error}"
            ) from error

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
        if reason := REFUSED.get(model_type):
            raise UnsupportedModelError(
                f"model type {model_type!r} is not supported: {reason}"
            ) from error
        raise UnsupportedModelError(
            f"model type {model_type!r} is not understood: {described(error)}"
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


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    found = config.dtype or config.get_text_config().dtype or torch.bfloat16
    return found if isinstance(found, torch.dtype) else getattr(torch, str(found))


def _with_kept(
    stored: Mapping[str, TensorEntry], outside: OutsideExperts, dtype: torch.dtype
) -> dict[str, TensorEntry]:
    """The tensors of an output, with the weights that stayed in FP8 as what they stand for."""
    weights = {f"{module}.weight" for module in outside.modules}
    kept = {name: e for name, e in stored.items() if name.removesuffix(outside.scale) in weights}
    decoded = coded_entries(kept, storage_of(outside), dtype)
    for name in sorted(weights):
        entry = decoded.get(name)
        if entry is None or entry.coding is None:
            found = f"is stored as {entry.dtype}" if entry else "is missing"
            raise CheckpointError(
                f"tensor {name} {found}, but quantization_config lists its module among "
                "outside_experts, which are stored in FP8: copy the checkpoint again"
            )
    return {name: entry for name, entry in stored.items() if name not in kept} | decoded


def _refuse_codes(entries: Mapping[str, TensorEntry]) -> None:
    """Refuse quantized weights that no `quantization_config` explains."""
    for name, entry in entries.items():
        if entry.dtype not in (*FLOATS, "I32", *COUNTED):
            raise UnsupportedModelError(
                f"{entry.file}: {name} is stored as {entry.dtype}, and config.json has no "
                "quantization_config that says what it stands for: restore that file, or start "
                "from the 16-bit checkpoint"
            )


def _refuse_scales(
    file: Path, name: str, scales: torch.Tensor, remedy: str, *, zero: bool = False
) -> None:
    """Raise `DamagedWeightsError` unless all are positive and finite, or 0 where they may be."""
    good = ((scales >= 0) if zero else (scales > 0)) & scales.isfinite()
    if not good.all():
        raise DamagedWeightsError(
            f"{file}: {name} holds {int((~good).sum())} scales of {scales.numel()} that are not "
            f"positive: the file is damaged; {remedy}"
        )


def _of_an_expert(entry: TensorEntry, suffix: str, part: TensorEntry) -> Index:
    """Which of a part belongs to a weight: all, or one expert's where it is stored by expert."""
    assert entry.coding
    stacked = part.shape[:1] == entry.coding.shape[:1] and suffix != "_shape"
    return entry.index[:1] if stacked else ()


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf: both show in the extremes, which are found far faster."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())


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
        raise CheckpointError(
            f"{path} cannot be read as JSON: {first_line(error)}: download or write it again"
        ) from error
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


def read_conversion(folder: Path) -> ConversionReport | None:
    """What `convert` noted in a checkpoint's folder, if it wrote it.

    Raises `CheckpointError` for a file that is none.
    """
    file = folder / CONVERSION_FILE
    if not file.exists():
        return None
    try:
        return ConversionReport.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(
            f"{file} is not as camera-serve convert writes it: {describe_errors(error)}; copy it "
            "again, or convert again"
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
    if transposed and (coded := next((e for e in stored.values() if e.coding), None)):
        raise UnsupportedModelError(
            f"{path} stores experts fused, transposed and quantized ({coded.stored}): not read"
        )
    found = [
        (part.name, replace(entry, shape=part.shape, index=part.index, transposed=part.transposed))
        for stored_name, entry in stored.items()
        for part in logical_tensors(stored_name, entry.shape, entry.file, structure, transposed)
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
    return packed.get(name.rpartition(".")[2], FLOATS)


def check_shapes(found: Shapes, wanted: Shapes, structure: MoeStructure, path: Path) -> None:
    """Compare tensor names and shapes with what a config implies.

    Raises `CheckpointError` naming the first at fault. Tensors that the model itself does not load
    may be there: rotary tables, tied heads, layers past the last one, other models' parts.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor {name} {list(shape)} is missing: {FOLDER_AGAIN}")
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found[name])}, config.json implies "
                f"{list(shape)}: {FOLDER_AGAIN}"
            )
    _refuse_layers_past_the_last(found, structure, path)
    extra = [name for name in found if name not in wanted and not _may_be_there(name, structure)]
    if extra:
        raise CheckpointError(
            f"{path}: tensor {sorted(extra)[0]} is not part of this model as config.json describes "
            f"it ({len(extra)} such tensors)"
        )


def _refuse_layers_past_the_last(found: Shapes, structure: MoeStructure, path: Path) -> None:
    """Refuse a layer that config.json does not count, unless it drafts tokens."""
    layers = {structure.layer_number(name) for name in found} - {None}
    for layer in sorted(n for n in layers if n is not None and n >= structure.num_layers):
        drafts = f"{structure.layer_prefix(layer)}.{DRAFTS}"
        if drafts not in found:
            raise CheckpointError(
                f"{path} holds layer {layer}, but num_hidden_layers is {structure.num_layers} in "
                f"config.json, and without {drafts} it is none that drafts tokens: correct "
                "config.json, or download the model again"
            )


def _may_be_there(name: str, structure: MoeStructure) -> bool:
    # `mtp.fc.weight` and `model.visual.…` have no place in the stack of layers, `model.` here.
    stack = structure.layer_prefix(0).removesuffix("layers.0")
    if not name.startswith((stack, "lm_head.")):
        return True
    tied = structure.to_hf_name(name) == "lm_head.weight"
    elsewhere = name.startswith(structure.family.elsewhere)
    alone = tied or elsewhere or name.endswith("rotary_emb.inv_freq")
    return alone or structure.is_draft(name)


def _quantization(
    raw: Mapping[str, Any], path: Path
) -> tuple[CameraQuantizationConfig | None, StoredQuantization | None]:
    """What config.json says of our compression, or of how an original is quantized."""
    data = stored_quantization(raw, path)
    if data is None:
        return None, None
    if isinstance(data, dict) and data.get("quant_method") == "camera":
        return CameraQuantizationConfig.parse(data), None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"quantization_config is {data!r:.100}: wanted an object with quant_method; download "
            "config.json again"
        )
    if data.keys().isdisjoint(("quant_method", "quantization")):
        raise CheckpointError(
            "quantization_config has no quant_method, so nobody knows how weights are stored: "
            "download config.json again, or remove quantization_config where they are in 16 bits"
        )
    return None, parse(data)


def stored_quantization(raw: Mapping[str, Any], path: Path) -> Any:
    """The `quantization_config` in config.json, or of its text model, or beside it; None for none.

    Raises `CheckpointError` where `compress` wrote the folder, and config.json has lost it.
    """
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION_KEYS:
            if config.get(key) is not None:
                return config[key]
    beside = path / MARKER_FILE
    found = read_json(beside) if beside.is_file() else {}
    if found == MARKER:
        raise CheckpointError(LOST)
    return found if "quantization" in found else None


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder that hold its model, by its index where it has one.

    Raises `CheckpointError` for one that is missing, and where it is not clear which they are.
    """
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path / INDEX).values()))
        _warn_of_unnamed(path, names)
        for name in names:
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name} is missing: {INDEX} names it")
        _refuse_another_model(path, names)
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    # Copies of the weights in another format may lie beside them, and adapters.
    files = [file for file in found if not is_left_out(file.name)]
    if not files:
        others = [file.name for file in found]
        raise CheckpointError(f"{path} holds no safetensors file{_other_weights(path, others)}")
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} safetensors files but no {INDEX}: download that too, or "
            "remove those that are not this model's"
        )
    return files


def _warn_of_unnamed(path: Path, names: Iterable[str]) -> None:
    """Say which safetensors files the index passes over: transformers and vLLM do so in silence."""
    found = {file.name for file in path.glob("*.safetensors") if not is_left_out(file.name)}
    if unnamed := sorted(found.difference(names)):
        logger.warning(
            "%s: %s holds tensors that %s does not name, as transformers and vLLM ignore them: "
            "they are not carried over. If they belong to the model, add them to the index",
            path,
            ", ".join(unnamed[:3]) + (f" (and {len(unnamed) - 3} more)" if unnamed[3:] else ""),
            INDEX,
        )


def _other_weights(path: Path, others: list[str]) -> str:
    """What a folder has instead of weights that can be read, and what to do."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pt") for file in path.glob(kind))
    if pickled:
        return f"; it has pickled weights ({pickled[0]}): convert them to safetensors"
    if others:
        return f" of a whole model in the Hugging Face format, only {others[0]}: download that"
    if other_formats := sorted(file.name for file in path.glob("*.gguf")):
        return f", only {other_formats[0]}: download the model as safetensors"
    if begun := sorted(file.name for file in path.rglob("*.incomplete")):
        return f", only a part of a download ({begun[0]}): download the model again"
    return ": download the model again, with its weights"


def _check_index(path: Path, stored: Mapping[str, TensorEntry]) -> None:
    """Refuse an index of other tensors: config.json knows nothing of those that are carried."""
    index = path / INDEX
    for name, file in _weight_map(index).items() if index.exists() else ():
        if name not in stored:
            raise CheckpointError(
                f"{path / file}: tensor {name} is missing, and {INDEX} names it: copy both files "
                "again from where they came from"
            )


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(f"{index} holds no weight_map of plain file names")
    return weight_map


def _refuse_another_model(path: Path, names: list[str]) -> None:
    """Refuse a whole model beside the one that the index names: transformers would take that."""
    if (path / WHOLE).exists() and WHOLE not in names:
        raise CheckpointError(
            f"{path} has both {WHOLE} and an {INDEX} that names {names[0] if names else 'none'}, "
            "and transformers reads the first, vLLM the second: remove the one that is not this "
            "model"
        )


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
