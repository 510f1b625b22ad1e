"""A ragged layer packed for the C++ kernel, and the call of it."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from camera_serve.errors import KernelError
from camera_serve.kernels.cpu.build import shared_library
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows

UNIT = 32
ACTIVATIONS = "CAMERA_SERVE_CPU_ACTIVATIONS"
"""The variable that says what packed tiers of at most 4 bits are multiplied with."""

_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux
_FAULTS = {
    1: "a shape it cannot take",
    2: "offsets that fall or do not start at 0",
    3: "packed weights of another size than the offsets say",
    4: "no memory for the activations",
    5: "no such instruction set on this machine",
}


@dataclass(frozen=True)
class CpuTier:
    """One tier, every weight in the order the kernel reads it (`kernels/README.md`).

    offsets: int64 `[num_experts + 1]`, in micro-experts; gate_up, down: uint8.
    """

    bits: int
    offsets: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class CpuLayer:
    """The routed experts of one MoE layer, packed."""

    d_model: int
    group_size: int
    tiers: tuple[CpuTier, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, scales and zeros included."""
        return sum(tier.gate_up.numel() + tier.down.numel() for tier in self.tiers)


class _Tier(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("gate_up_bytes", ctypes.c_int64),
        ("down", ctypes.c_void_p),
        ("down_bytes", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("num_experts", ctypes.c_int64),
        ("d_model", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("num_tiers", ctypes.c_int64),
        ("tiers", ctypes.POINTER(_Tier)),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
    )


def pack_layer(layer: RaggedLayer) -> CpuLayer:
    """Copy a layer's rows into the order the kernel reads; the layer can be dropped afterwards.

    16-bit rows must be bf16, d_model and the group size multiples of 32. Packed tiers take the
    bytes they had, rounded up to 32 micro-experts per expert and tier in down. Raises `KernelError`
    for rows it cannot take and `KernelBuildError` when the kernel cannot be compiled.
    """
    d_model, group_size = _form(layer.tiers[0].gate).d_model, _group_size(layer)
    for number, tier in enumerate(layer.tiers):
        _check_tier(number, tier, layer.num_experts, d_model, group_size)
    tiers = tuple(_pack_tier(tier, d_model, group_size) for tier in layer.tiers)
    return CpuLayer(d_model, group_size, tiers)


def ragged_moe(
    x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor, layer: CpuLayer
) -> torch.Tensor:
    """Weighted sum of the routed experts' outputs (Eq. 2), as `ragged.layer.ragged_moe`.

    x: bf16 `[num_tokens, d_model]`; top_k_weights: `[num_tokens, top_k]`; top_k_ids: int
    `[num_tokens, top_k]`, where an id outside `[0, num_experts)` adds nothing. Returns a new bf16
    `[num_tokens, d_model]`; sums in float32, the same for any number of threads.
    """
    _check_call(x, top_k_weights, top_k_ids, layer)
    x, weights, ids = x.contiguous(), top_k_weights.float().contiguous(), _int32(top_k_ids)
    out = torch.empty_like(x)
    described = _describe(layer)
    code = _library().camera_moe(
        ctypes.byref(described),
        *(tensor.data_ptr() for tensor in (x, weights, ids)),
        *ids.shape,
        out.data_ptr(),
    )
    _check(code, "the CPU kernel")
    return out


def isa() -> str:
    """The instruction set in use: `avx512_bf16`, `avx2` or `portable`."""
    return bytes(_library().camera_isa()).decode()


def use_isa(name: str) -> None:
    """Use another instruction set; raises `KernelError` when the machine lacks it."""
    _check(_library().camera_use_isa(name.encode()), f"instruction set {name!r}")


def activations() -> str:
    """What packed tiers of at most 4 bits are multiplied with: `int8` or `bf16`."""
    return "int8" if _library().camera_int8() else "bf16"


def use_activations(name: str) -> None:
    """Choose what packed tiers of at most 4 bits are multiplied with: bf16, int8, or auto (bf16).

    Raises `KernelError` for another name.
    """
    _choose(_library(), name)


def _choose(library: ctypes.CDLL, name: str) -> None:
    if name not in ("auto", "int8", "bf16"):
        raise KernelError(f"{ACTIVATIONS} is {name!r}, wanted auto, int8 or bf16")
    library.camera_use_int8(name == "int8")


@cache
def _library() -> ctypes.CDLL:
    library = _load()
    _choose(library, os.environ.get(ACTIVATIONS, "auto"))
    return library


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(shared_library()))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    rows = ctypes.POINTER(_Rows)
    for function in (library.camera_gate_up_bytes, library.camera_down_bytes):
        function.argtypes, function.restype = (size,) * 4, size
    library.camera_pack_gate_up.argtypes = (*(size,) * 4, rows, rows, pointer)
    library.camera_pack_down.argtypes = (*(size,) * 4, rows, pointer)
    library.camera_moe.argtypes = (ctypes.POINTER(_Layer), *(pointer,) * 3, size, size, pointer)
    library.camera_isa.restype = ctypes.c_char_p
    library.camera_int8.restype = ctypes.c_int
    library.camera_use_int8.argtypes, library.camera_use_int8.restype = (ctypes.c_int,), None
    library.camera_use_isa.argtypes = (ctypes.c_char_p,)
    return library


def _pack_tier(tier: RaggedTier[Rows], d_model: int, group_size: int) -> CpuTier:
    library = _library()
    bits = tier.gate.bits if isinstance(tier.gate, PackedRows) else 16
    counts = [end - start for start, end in pairwise(tier.offsets)]
    shapes = [(bits, count, d_model, group_size) for count in counts]
    gate_up_bytes = [library.camera_gate_up_bytes(*shape) for shape in shapes]
    down_bytes = [library.camera_down_bytes(*shape) for shape in shapes]
    if min(gate_up_bytes + down_bytes) < 0:
        raise KernelError(
            f"the CPU kernel takes d_model and group size in multiples of {UNIT}, found d_model "
            f"{d_model} and groups of {group_size} at {bits} bits"
        )
    gate_up, down = _memory(sum(gate_up_bytes)), _memory(sum(down_bytes))
    gate_up_at, down_at = gate_up.data_ptr(), down.data_ptr()
    for expert, shape in enumerate(shapes):
        own = tier.rows(expert)
        # Bound to names: the pointers in `_Rows` do not keep a copied tensor alive.
        held = [_contiguous(matrix, own) for matrix in (tier.gate, tier.up, tier.down)]
        gate, up, rows_of_down = (_Rows(*(t.data_ptr() for t in tensors)) for tensors in held)
        _check(library.camera_pack_gate_up(*shape, gate, up, gate_up_at), "packing gate and up")
        _check(library.camera_pack_down(*shape, rows_of_down, down_at), "packing down")
        gate_up_at += gate_up_bytes[expert]
        down_at += down_bytes[expert]
    return CpuTier(bits, torch.tensor(tier.offsets, dtype=torch.int64), gate_up, down)


def _contiguous(matrix: Rows, rows: slice) -> tuple[torch.Tensor, ...]:
    if isinstance(matrix, PackedRows):
        parts = (matrix.words, matrix.scales, matrix.zeros)
        return tuple(part[rows].contiguous() for part in parts)
    if matrix.dtype != torch.bfloat16:
        raise KernelError(f"the CPU kernel takes 16-bit rows in bfloat16, found {matrix.dtype}")
    return (matrix[rows].contiguous(),)


def _memory(num_bytes: int) -> torch.Tensor:
    """Uninitialised bytes in huge pages where the system has them: fewer address look-ups."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    start = -(-memory.data_ptr() // 4096) * 4096
    size = memory.data_ptr() + num_bytes - start
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise and size > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _HUGE_PAGES)
    return memory


def _describe(layer: CpuLayer) -> _Layer:
    tiers = (_Tier * len(layer.tiers))(
        *(
            _Tier(
                tier.bits,
                tier.offsets.data_ptr(),
                tier.gate_up.data_ptr(),
                tier.gate_up.numel(),
                tier.down.data_ptr(),
                tier.down.numel(),
            )
            for tier in layer.tiers
        )
    )
    num_experts = layer.tiers[0].offsets.numel() - 1
    return _Layer(num_experts, layer.d_model, layer.group_size, len(tiers), tiers)


@dataclass(frozen=True)
class _Form:
    """What rows are made of; group_size is None at 16 bits."""

    bits: int
    rows: int
    d_model: int
    group_size: int | None


def _form(matrix: Rows) -> _Form:
    if not isinstance(matrix, PackedRows):
        rows, d_model = matrix.shape
        return _Form(16, rows, d_model, None)
    rows, words = matrix.words.shape
    d_model = words * 32 // matrix.bits
    if matrix.scales.shape != matrix.zeros.shape or len(matrix.scales) != rows:
        raise KernelError(
            f"{rows} packed rows have scales {list(matrix.scales.shape)} and zeros "
            f"{list(matrix.zeros.shape)}, wanted [{rows}, groups] for both"
        )
    return _Form(matrix.bits, rows, d_model, d_model // max(1, matrix.scales.shape[1]))


def _group_size(layer: RaggedLayer) -> int:
    forms = [_form(tier.gate) for tier in layer.tiers]
    packed = (form.group_size for form in forms if form.group_size is not None)
    # Without packed tiers nothing is grouped, and any divisor will do.
    return next(packed, forms[0].d_model)


def _check_tier(
    number: int, tier: RaggedTier[Rows], num_experts: int, d_model: int, group_size: int
) -> None:
    rows, bits = tier.offsets[-1], _form(tier.gate).bits
    wanted = _Form(bits, rows, d_model, None if bits == 16 else group_size)
    for name in ("gate", "up", "down"):
        if (found := _form(getattr(tier, name))) != wanted:
            raise KernelError(f"{name} of tier {number} is {found}, wanted {wanted}")
    falls = any(end < start for start, end in pairwise(tier.offsets))
    if len(tier.offsets) != num_experts + 1 or tier.offsets[0] != 0 or falls:
        raise KernelError(
            f"offsets of tier {number} are {len(tier.offsets)} from {tier.offsets[0]} to {rows}"
            f"{', and fall' if falls else ''}; wanted {num_experts + 1} that rise from 0"
        )


def _check_call(
    x: torch.Tensor, top_k_weights: torch.Tensor, top_k_ids: torch.Tensor, layer: CpuLayer
) -> None:
    if x.dtype != torch.bfloat16:
        raise KernelError(f"the CPU kernel takes bfloat16 activations, found {x.dtype}")
    if x.dim() != 2 or x.shape[1] != layer.d_model:
        raise KernelError(f"x is {list(x.shape)}, wanted [num_tokens, {layer.d_model}]")
    shapes_fit = top_k_ids.shape == top_k_weights.shape and top_k_ids.shape[:1] == x.shape[:1]
    if top_k_ids.dim() != 2 or not shapes_fit:
        raise KernelError(
            f"top_k_ids is {list(top_k_ids.shape)} and top_k_weights {list(top_k_weights.shape)}, "
            f"wanted [{len(x)}, top_k] for both"
        )
    num_experts = {tier.offsets.numel() for tier in layer.tiers}
    if len(num_experts) != 1 or any(tier.offsets.dtype != torch.int64 for tier in layer.tiers):
        raise KernelError("the offsets of all tiers must be int64 [num_experts + 1]")


def _int32(ids: torch.Tensor) -> torch.Tensor:
    if ids.dtype != torch.int32:
        # Ids beyond 32 bits must not wrap into the range of real ones.
        ids = ids.clamp(-1, 2**31 - 1).to(torch.int32)
    return ids.contiguous()


def _check(code: int, what: str) -> None:
    if code:
        raise KernelError(f"{what}: {_FAULTS.get(code, f'error {code}')}")
