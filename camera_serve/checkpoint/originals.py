"""Originals that are published quantized: what their config says, and their tensors as weights.

Which weights are quantized is told twice, by `quantization_config` and by the tensors stored; where
the two disagree the model is refused.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camera_serve.checkpoint.entries import COUNTED, NAMES, Coding, TensorEntry
from camera_serve.checkpoint.format import OutsideExperts
from camera_serve.errors import CheckpointError, UnsupportedModelError
from camera_serve.models.formats import FLOATS, Fp4, Fp8, Mxfp4, PackedInt, WeightFormat
from camera_serve.recipe import describe_errors

_PART = re.compile(
    r"(?P<name>.+\.(?:weight|gate_up_proj|down_proj))(?P<part>_scale_inv|_scale_2|_scale"
    r"|_global_scale|_packed|_shape|_zero_point|_g_idx|_blocks|_scales)"
)
_ACTIVATIONS = re.compile(
    r".+[._](?:input_scale|input_global_scale|activation_scale|output_scale|[qkv]_scale|prob_scale)"
)
"""Scales of activations: weights that are decoded have no use for them."""

_LINEAR = "Linear"
"""The target that compressed-tensors gives to all linear layers, experts among them."""

ACCEPTED = (
    "fp8, mxfp4, compressed-tensors (float-quantized, pack-quantized of 4 or 8 bits, "
    "nvfp4-pack-quantized, mxfp4-pack-quantized) and modelopt (FP8, NVFP4)"
)


@dataclass(frozen=True)
class Group:
    """Modules that are stored in one way, in the first of `formats` whose parts are all there.

    targets: names of modules, patterns, or `Linear`.
    """

    targets: tuple[str, ...]
    formats: tuple[WeightFormat, ...]

    def covers(self, module: str) -> bool:
        """Whether a module's weight is stored so."""
        return _LINEAR in self.targets or any(_matches(t, module) for t in self.targets)


@dataclass(frozen=True)
class StoredQuantization:
    """What an original's `quantization_config` says of its weights.

    ignored: names and patterns of modules that it excepts; dynamic: engines find the scales of
    activations themselves.
    """

    method: str
    groups: tuple[Group, ...]
    ignored: tuple[str, ...] = ()
    dynamic: bool = True

    @property
    def title(self) -> str:
        """Method and formats in words."""
        titles = dict.fromkeys(group.formats[0].title for group in self.groups)
        return f"{self.method} ({', '.join(titles)})"

    def exception(self, module: str) -> str | None:
        """The entry that excepts a module, if one does."""
        # Published lists name hundreds of modules, and there are tens of thousands of experts.
        plain = self._plain.intersection(_names_around(module))
        return min(plain, default=next((p for p in self._patterns if _matches(p, module)), None))

    @cached_property
    def _patterns(self) -> tuple[str, ...]:
        return tuple(entry for entry in self.ignored if _is_pattern(entry))

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(self.ignored) - set(self._patterns)

    def formats(self, module: str) -> tuple[WeightFormat, ...]:
        """The ways a module's weight may be stored; none for one that is not quantized."""
        if self.exception(module) is not None:
            return ()
        covering = [group for group in self.groups if group.covers(module)]
        # As in compressed-tensors, a name or a pattern goes before a class of modules.
        covering.sort(key=lambda group: _LINEAR in group.targets)
        return covering[0].formats if covering else ()


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or "*" in entry


def _matches(entry: str, module: str) -> bool:
    """Whether an entry of a config names a module, one around it, or the end of its name."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    if "*" in entry:
        return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")
    return entry in _names_around(module)


def _names_around(module: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`, `b.c` and `c` for `a.b.c`: the names that a list may have it under."""
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    yield from (".".join(parts[start:]) for start in range(1, len(parts)))


class _Foreign(BaseModel):
    """Settings that others write: what is not needed to read weights is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


Positive = Annotated[int, Field(gt=0)]


class _Fp8Settings(_Foreign):
    weight_block_size: tuple[Positive, Positive] | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    ignored_layers: tuple[str, ...] | None = None
    activation_scheme: str = "dynamic"
    store_dtype: None = None


class _Mxfp4Settings(_Foreign):
    modules_to_not_convert: tuple[str, ...] | None = None


class _WeightSettings(_Foreign):
    num_bits: int
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    block_structure: tuple[Positive, Positive] | None = None
    actorder: bool | str | None = None


class _GroupSettings(_Foreign):
    targets: tuple[str, ...]
    weights: _WeightSettings | None = None
    format: str | None = None


class _CompressedTensorsSettings(_Foreign):
    config_groups: dict[str, _GroupSettings]
    format: str
    ignore: tuple[str, ...] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class _ModelOptSettings(_Foreign):
    quant_algo: str
    group_size: Positive | None = None
    ignore: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None


def parse(data: Any) -> StoredQuantization:
    """Read the `quantization_config` of an original.

    Raises `UnsupportedModelError` for a method, or one of its settings, that is not read here,
    `CheckpointError` for a setting of the wrong kind.
    """
    method = data.get("quant_method") if isinstance(data, dict) else data
    inner = data.get("quantization") if isinstance(data, dict) else None
    if method is None and isinstance(inner, dict) and "quant_algo" in inner:
        method = "modelopt"
    readers = {
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
    }
    if not isinstance(method, str) or method not in readers:
        raise UnsupportedModelError(
            f"the model is already quantized with {method!r}, which is not read: start from its "
            f"16-bit checkpoint, or from one in {ACCEPTED}"
        )
    try:
        return _with_patterns(readers[method](data))
    except ValidationError as error:
        raise CheckpointError(
            f"quantization_config of {method} is not understood: {describe_errors(error)}"
        ) from error


def _with_patterns(quantization: StoredQuantization) -> StoredQuantization:
    """The same; raises `CheckpointError` for a pattern that is none."""
    targets = (target for group in quantization.groups for target in group.targets)
    for entry in (*quantization.ignored, *targets):
        if entry.startswith("re:"):
            try:
                re.compile(entry.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(
                    f"quantization_config of {quantization.method} has the pattern {entry!r:.100}, "
                    f"which is no regular expression ({error}): download config.json again"
                ) from error
    return quantization


def _fp8(data: Mapping[str, Any]) -> StoredQuantization:
    settings = _Fp8Settings.model_validate(data)
    block = settings.weight_block_size
    formats = (
        (Fp8("_scale_inv", block),) if block else (Fp8("_scale", None), Fp8("_scale_inv", None))
    )
    ignored = settings.modules_to_not_convert or settings.ignored_layers or ()
    dynamic = settings.activation_scheme == "dynamic"
    return StoredQuantization("fp8", (Group((_LINEAR,), formats),), ignored, dynamic)


def storage_of(outside: OutsideExperts) -> StoredQuantization:
    """What our own `quantization_config` says of weights that stayed in FP8."""
    format_ = Fp8(outside.scale, outside.weight_block_size)
    return StoredQuantization("camera", (Group(outside.modules, (format_,)),))


def _mxfp4(data: Mapping[str, Any]) -> StoredQuantization:
    settings = _Mxfp4Settings.model_validate(data)
    experts = (r"re:.*\.experts\.(gate_up_proj|down_proj)$",)
    ignored = settings.modules_to_not_convert or ()
    return StoredQuantization("mxfp4", (Group(experts, (Mxfp4(),)),), ignored)


def _compressed_tensors(data: Mapping[str, Any]) -> StoredQuantization:
    settings = _CompressedTensorsSettings.model_validate(data)
    sparse = (settings.sparsity_config or {}).get("format", "dense")
    if sparse != "dense":
        raise _not_read(f"sparsity_config of format {sparse!r}")
    if (settings.transform_config or {}).get("config_groups"):
        raise _not_read("transform_config: its weights are rotated")
    groups = tuple(
        Group(group.targets, (_compressed_format(group.weights, group.format or settings.format),))
        for group in settings.config_groups.values()
        if group.weights is not None
    )
    return StoredQuantization("compressed-tensors", groups, settings.ignore or ())


def _compressed_format(weights: _WeightSettings, name: str) -> WeightFormat:
    """The format of a group of compressed-tensors (its `QuantizationArgs`)."""
    grouped = weights.group_size if (weights.group_size or 0) > 0 else None
    strategy = weights.strategy or ("group" if grouped else "tensor")
    kind = (name, weights.type, weights.num_bits)
    if weights.actorder in (True, "group", "dynamic"):
        raise _not_read(f"actorder {weights.actorder!r}: its columns are in another order")
    match kind:
        case ("float-quantized" | "naive-quantized", "float", 8):
            if strategy == "block" and weights.block_structure:
                return Fp8("_scale", weights.block_structure)
            if strategy in ("tensor", "channel"):
                return Fp8("_scale", None)
        case ("pack-quantized", "int", 4 | 8) if strategy == ("group" if grouped else "channel"):
            return PackedInt(weights.num_bits, grouped, weights.symmetric)
        case ("nvfp4-pack-quantized", "float", 4) if grouped:
            return Fp4("_packed", grouped, "_global_scale", inverse=True)
        case ("mxfp4-pack-quantized", "float", 4) if grouped:
            return Fp4("_packed", grouped)
    raise _not_read(
        f"{name} of {weights.type}{weights.num_bits} with a scale per {strategy}, in "
        "compressed-tensors"
    )


def _modelopt(data: Mapping[str, Any]) -> StoredQuantization:
    settings = _ModelOptSettings.model_validate(data.get("quantization", data))
    algorithm = settings.quant_algo.upper()
    ignored = settings.ignore or settings.exclude_modules or ()
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        stored: WeightFormat = Fp4("", settings.group_size or 16, "_scale_2")
    elif algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        stored = Fp8("_scale", None)
    else:
        raise _not_read(f"quant_algo {settings.quant_algo!r} of modelopt")
    return StoredQuantization("modelopt", (Group((_LINEAR,), (stored,)),), ignored)


def _not_read(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model is already quantized, and {what} is not read: start from its 16-bit "
        f"checkpoint, or from one in {ACCEPTED}"
    )


def coded_entries(
    stored: Mapping[str, TensorEntry], quantization: StoredQuantization, dtype: torch.dtype
) -> dict[str, TensorEntry]:
    """The weights that stored tensors stand for, by name, to be decoded into `dtype`.

    Scales of activations are left out. Raises `CheckpointError` for a weight whose parts are not
    those of its format, and for one that the config does not say is quantized.
    """
    weights: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in stored.items():
        if _ACTIVATIONS.fullmatch(name):
            continue
        part = _PART.fullmatch(name)
        weight, suffix = (part["name"], part["part"]) if part else (name, "")
        weights.setdefault(weight, {})[suffix] = entry
    return {name: _entry(name, parts, quantization, dtype) for name, parts in weights.items()}


def _entry(
    name: str,
    parts: Mapping[str, TensorEntry],
    quantization: StoredQuantization,
    dtype: torch.dtype,
) -> TensorEntry:
    if parts.keys() == {""} and parts[""].dtype in (*FLOATS, *COUNTED):
        return parts[""]
    format_ = _format(name, parts, quantization)
    shape = _shape(name, parts, format_)
    codes = parts[format_.codes]
    coding = Coding(format_, shape, parts)
    return TensorEntry(codes.file, shape, NAMES[dtype], codes.stored, coding=coding)


def _format(
    name: str, parts: Mapping[str, TensorEntry], quantization: StoredQuantization
) -> WeightFormat:
    """The format of a quantized weight, all of whose parts are there, in their dtypes."""
    module = module_of(name)
    formats = quantization.formats(module)
    if not formats and quantization.method == "mxfp4":
        raise _not_read(f"mxfp4 of one matrix at a time ({name}; it is read of fused experts)")
    if not formats:
        entry = quantization.exception(module)
        why = f"excepts {entry!r}" if entry else "does not cover it"
        file = next(iter(parts.values())).file
        raise CheckpointError(
            f"{file}: {name} is stored quantized ({_described(parts)}), but "
            f"quantization_config of {quantization.method} {why}: {_REMEDY}"
        )
    format_ = next((f for f in formats if f.dtypes.keys() == parts.keys()), formats[0])
    _check_parts(name, parts, format_)
    return format_


def _check_parts(name: str, parts: Mapping[str, TensorEntry], format_: WeightFormat) -> None:
    file = next(iter(parts.values())).file
    for suffix in sorted(format_.dtypes.keys() - parts.keys()):
        raise CheckpointError(
            f"{file}: {name}{suffix} is missing: {name} is stored in {format_.title}, and found of "
            f"it is {_described(parts)}: {_REMEDY}"
        )
    if "_g_idx" in parts:
        raise _not_read(f"actorder (tensor {name}_g_idx)")
    for suffix in sorted(parts.keys() - format_.dtypes.keys()):
        raise CheckpointError(
            f"{file}: {name}{suffix} is no part of {format_.title}, in which quantization_config "
            f"says {name} is stored: {_REMEDY}"
        )
    for suffix, wanted in format_.dtypes.items():
        if parts[suffix].dtype not in wanted:
            raise CheckpointError(
                f"{file}: {name}{suffix} is stored as {parts[suffix].dtype}, wanted "
                f"{' or '.join(wanted)} for {format_.title}: {_REMEDY}"
            )


_REMEDY = "download config.json and the weights again, of one revision"


def _described(parts: Mapping[str, TensorEntry]) -> str:
    return ", ".join(
        f"{entry.stored.rpartition('.')[2]} {entry.dtype} {list(entry.shape)}"
        for entry in parts.values()
    )


def _shape(name: str, parts: Mapping[str, TensorEntry], format_: WeightFormat) -> tuple[int, ...]:
    """The weight's shape; raises `CheckpointError` for a part that does not fit it."""
    found = {suffix: entry.shape for suffix, entry in parts.items()}
    codes = parts[format_.codes]
    shape = format_.shape(found) if len(codes.shape) > 1 else ()
    if len(shape) < 2:
        raise CheckpointError(
            f"{codes.file}: {codes.stored} has shape {list(codes.shape)}, and {format_.title} is "
            f"for matrices: {_REMEDY}"
        )
    for suffix, wanted in format_.part_shapes(shape).items():
        if found[suffix] not in wanted:
            raise CheckpointError(
                f"{parts[suffix].file}: {name}{suffix} has shape {list(found[suffix])}, wanted "
                f"{' or '.join(str(list(s)) for s in wanted)} for {format_.title} of a weight "
                f"{list(shape)}: {_REMEDY}"
            )
    return shape


def check_experts(
    experts: Iterable[tuple[str, TensorEntry]], quantization: StoredQuantization
) -> None:
    """Refuse an expert's weight that is stored in 16 bits though the config says it is quantized.

    Routers and heads are not: configs name them in as many ways as there are tools.
    """
    for name, entry in experts:
        if entry.coding is None and quantization.formats(module_of(entry.stored)):
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {entry.dtype}, but quantization_config of "
                f"{quantization.method} says that it is quantized: {_REMEDY}"
            )


def module_of(name: str) -> str:
    """The module that a weight belongs to, as configs name it; fused experts are one."""
    return name.removesuffix(".weight")
