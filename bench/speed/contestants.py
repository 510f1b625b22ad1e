"""One MoE layer with random weights, as each CPU kernel under comparison holds and runs it."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any, Literal

import torch

from bench.shapes.published import Shape, layer_counts
from camera_serve.errors import CameraError
from camera_serve.kernels.cpu import pack_layer, ragged_moe
from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.layout import LayerLayout
from camera_serve.ragged.packing import words_per_row
from camera_serve.recipe import TierPlan

GROUP_SIZE = 128
RAW_AND_VLLM_BYTES = 2 + 2
# zentorch keeps what it is given and, from the first run on, its own copies: 4 bytes a weight
# beside bf16, which it shares with us, 1 + 2.6 at 8 bits and 0.5 + 2.5 at 4 (measured, 2.13.0.1).
ZENTORCH_BYTES = 4 + 1 + 2.6 + 0.5 + 2.5
"""Memory for each weight of the whole layer."""

Kind = Literal["dense", "quantized", "camera"]
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contestant:
    """A kernel with its own copy of a layer.

    run: x, top-k weights, top-k ids -> output, as `ragged.layer.ragged_moe`. expert_bytes,
    expert_d_ff: int64 `[num_experts]`, what reading an expert's weights moves and its width.
    """

    name: str
    kind: Kind
    run: Run
    expert_bytes: torch.Tensor
    expert_d_ff: torch.Tensor


@dataclass(frozen=True)
class DenseWeights:
    """Whole experts as vLLM loads them, bf16.

    w13: gate above up, `[num_experts, 2 * d_ff, d_model]`; w2: `[num_experts, d_model, d_ff]`.
    """

    w13: torch.Tensor
    w2: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, generator: torch.Generator) -> "DenseWeights":
        """Normal weights, scaled so that activations keep their size from layer to layer."""
        experts, d_ff, d_model = shape.num_experts, shape.d_ff, shape.d_model
        w13 = torch.empty(experts, 2 * d_ff, d_model, dtype=torch.bfloat16)
        w2 = torch.empty(experts, d_model, d_ff, dtype=torch.bfloat16)
        w13.normal_(std=d_model**-0.5, generator=generator)
        w2.normal_(std=d_ff**-0.5, generator=generator)
        return cls(w13, w2)


def contestants(
    shape: Shape, plans: Sequence[TierPlan], seed: int, generator: torch.Generator
) -> Iterator[Contestant]:
    """Every stock kernel installed here, then ours under each plan; the dense ones share weights.

    `seed` is the layer whose widths are drawn.
    """
    dense = DenseWeights.random(shape, generator)
    yield from stock_contestants(dense)
    for plan in plans:
        yield camera(random_layer(shape, plan, seed, dense, generator), plan, shape.d_model)


def stock_contestants(dense: DenseWeights) -> Iterator[Contestant]:
    """vLLM's own kernel, and zentorch's in bf16, 8 and 4 bits where it is installed."""
    yield own_of_vllm(dense)
    if has_zentorch():
        yield _zentorch("zentorch", "dense", dense, (dense.w13, dense.w2), ())
        # vLLM's `experts_int8`, and its 4-bit checkpoints with one scale for each group.
        for name, quantize in (("zentorch int8", _int8), ("zentorch int4", _int4)):
            (w13, s13), (w2, s2) = quantize(dense.w13), quantize(dense.w2)
            yield _zentorch(name, "quantized", dense, (w13, w2), (s13, s2))


def camera(layer: RaggedLayer, plan: TierPlan, d_model: int) -> Contestant:
    """Our kernel on a ragged layer that a plan has left."""
    return camera_named(name_of(plan), layer, plan.bits, d_model)


def camera_named(
    name: str, layer: RaggedLayer, tier_bits: Sequence[int], d_model: int
) -> Contestant:
    """Our kernel on a ragged layer."""
    packed = pack_layer(layer)
    counts = torch.tensor([tier.offsets for tier in layer.tiers]).diff(dim=1)
    row_bytes = torch.tensor([micro_expert_bytes(bits, d_model) for bits in tier_bits])
    return Contestant(
        name=name,
        kind="camera",
        run=lambda x, weights, ids: ragged_moe(x, weights, ids, packed),
        expert_bytes=(counts * row_bytes[:, None]).sum(0),
        expert_d_ff=counts.sum(0),
    )


def name_of(plan: TierPlan) -> str:
    """`λ = 40%` for pruning alone, `2.25 bits` for quantizing alone, otherwise the plan."""
    if not plan.quantized:
        return f"λ = {100 * plan.pruned:g}%"
    if plan.pruned:
        return str(plan)
    # Bits per weight do not depend on d_model.
    return f"{plan_bytes(plan, GROUP_SIZE) * 8 / (3 * GROUP_SIZE):g} bits"


def micro_expert_bytes(bits: int, d_model: int) -> int:
    """Stored bytes of one micro-expert's three rows, float16 scales and zeros included."""
    groups = d_model // GROUP_SIZE if bits < 16 else 0
    return 3 * (d_model * bits // 8 + 4 * groups)


def plan_bytes(plan: TierPlan, d_model: int) -> float:
    """Stored bytes of a micro-expert of the original layer, on average over the plan's tiers."""
    return sum(t.fraction * micro_expert_bytes(t.bits, d_model) for t in plan.tiers if t.bits)


def random_layer(
    shape: Shape,
    plan: TierPlan,
    seed: int,
    dense: DenseWeights,
    generator: torch.Generator,
) -> RaggedLayer:
    """What a plan leaves of layer `seed`: 16-bit rows are the dense ones, codes are random."""
    return layer_of(shape, plan.bits, layer_counts(shape, plan, seed), dense, generator)


def layer_of(
    shape: Shape,
    tier_bits: Sequence[int],
    layout: LayerLayout,
    dense: DenseWeights,
    generator: torch.Generator,
) -> RaggedLayer:
    """The routed experts of a layout: 16-bit rows are the dense ones, codes are random."""
    counts = torch.tensor(layout.experts)
    tiers: list[RaggedTier[Rows]] = []
    for bits, widths in zip(tier_bits, counts.T.tolist(), strict=True):
        offsets = (0, *accumulate(widths))
        if bits == 16:
            tiers.append(_first_rows(dense, widths, offsets))
        else:
            size = (offsets[-1], shape.d_model)
            gate, up, down = (_random_rows(bits, *size, generator) for _ in range(3))
            tiers.append(RaggedTier(gate, up, down, offsets))
    return RaggedLayer(tuple(tiers))


def dequantized(layer: RaggedLayer, shape: Shape) -> DenseWeights:
    """A layer in bf16 as dense kernels take it: experts of `shape.d_ff`, zeros where pruned."""
    experts, d_ff, d_model = shape.num_experts, shape.d_ff, shape.d_model
    w13 = torch.zeros(experts, 2 * d_ff, d_model, dtype=torch.bfloat16)
    w2 = torch.zeros(experts, d_model, d_ff, dtype=torch.bfloat16)
    for expert in range(experts):
        start = 0
        for tier in layer.tiers:
            rows = tier.rows(expert)
            end = start + rows.stop - rows.start
            w13[expert, start:end] = _bf16(tier.gate, rows)
            w13[expert, d_ff + start : d_ff + end] = _bf16(tier.up, rows)
            w2[expert, :, start:end] = _bf16(tier.down, rows).T
            start = end
    return DenseWeights(w13, w2)


def _bf16(matrix: Rows, rows: slice) -> torch.Tensor:
    if isinstance(matrix, PackedRows):
        return matrix.dequantize(rows, torch.bfloat16)
    return matrix[rows]


def fitting(shape: Shape, plans: Sequence[TierPlan], limit: int) -> Shape:
    """The shape with as many experts as `limit` bytes hold in all contestants at once.

    Raises `CameraError` when not even one token's experts fit.
    """
    weights = 3 * shape.d_ff * shape.d_model
    ours = [shape.d_ff * plan_bytes(plan, shape.d_model) for plan in plans]
    stock = weights * (RAW_AND_VLLM_BYTES + has_zentorch() * ZENTORCH_BYTES)
    # While one of ours is packed, its rows lie beside it.
    each = stock + sum(ours) + max(ours, default=0)
    experts = min(shape.num_experts, int(limit / each))
    if experts < shape.top_k:
        raise CameraError(
            f"{limit / 1e9:.1f} GB hold {experts} experts in every contestant, and a token needs "
            f"{shape.top_k}: raise --memory-limit to {shape.top_k * each / 1e9:.1f}, or time fewer "
            "--plans at once"
        )
    return shape.model_copy(update={"num_experts": experts})


def has_zentorch() -> bool:
    """Whether AMD's extension, which vLLM prefers on AMD CPUs, is installed."""
    try:
        importlib.import_module("zentorch")
    except ImportError:
        return False
    return True


def _vllm_ops() -> ModuleType:
    try:
        return importlib.import_module("vllm._custom_ops")
    except ImportError as error:
        raise CameraError(
            f"vLLM, the baseline, does not load: {error}; run `make setup` on a machine with a CPU"
        ) from error


def own_of_vllm(dense: DenseWeights) -> Contestant:
    """vLLM's own kernel for unquantized experts."""
    ops = _vllm_ops()
    # The choice vLLM makes.
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    w13, w2 = (ops.cpu_prepack_moe_weight(w, isa) for w in (dense.w13, dense.w2))

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, "silu", isa)
        return out

    return Contestant("vLLM's own", "dense", run, *_uniform(dense, (w13, w2)))


def _zentorch(
    name: str,
    kind: Kind,
    dense: DenseWeights,
    matrices: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, ...],
) -> Contestant:
    fused: Any = torch.ops.zentorch.zentorch_fused_moe

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        fused(out, x, *matrices, None, None, weights, ids, False, "silu", *scales)
        return out

    return Contestant(name, kind, run, *_uniform(dense, (*matrices, *scales)))


def _uniform(
    dense: DenseWeights, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and width of each of some equal experts."""
    experts, d_ff = len(dense.w2), dense.w2.shape[2]
    held = sum(tensor.nbytes for tensor in tensors) // experts
    return torch.full((experts,), held), torch.full((experts,), d_ff)


def _int8(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One float32 scale per output, as vLLM quantizes while it loads."""
    codes = torch.empty_like(matrices, dtype=torch.int8)
    scales = matrices.abs().amax(-1).float() / 127
    for expert, matrix in enumerate(matrices):
        codes[expert] = (matrix / scales[expert, :, None]).round().clamp(-127, 127)
    return codes, scales


def _int4(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One bf16 scale per group of inputs, in zentorch's order: `[num_experts, groups, outputs]`."""
    words, scales = [], []
    for matrix in matrices:
        groups = matrix.float().unflatten(-1, (-1, GROUP_SIZE))
        scale = groups.abs().amax(-1) / 7
        codes = (groups / scale[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int8)
        words.append(torch.ops.zentorch.zentorch_woq_repack_weight(codes))
        scales.append(scale.T.bfloat16())
    return torch.stack(words), torch.stack(scales)


def _first_rows(
    dense: DenseWeights, widths: Sequence[int], offsets: tuple[int, ...]
) -> RaggedTier[Rows]:
    gate, up, down = (
        torch.empty(offsets[-1], dense.w2.shape[1], dtype=torch.bfloat16) for _ in range(3)
    )
    d_ff = dense.w2.shape[2]
    for expert, width in enumerate(widths):
        rows = slice(offsets[expert], offsets[expert + 1])
        gate[rows] = dense.w13[expert, :width]
        up[rows] = dense.w13[expert, d_ff : d_ff + width]
        down[rows] = dense.w2[expert, :, :width].T
    return RaggedTier(gate, up, down, offsets)


def _random_rows(bits: int, count: int, d_model: int, generator: torch.Generator) -> PackedRows:
    """Rows of random codes with about the variance of dense ones, in groups of 128."""
    size = (count, words_per_row(d_model, bits))
    words = torch.randint(-(2**31), 2**31, size, dtype=torch.int32, generator=generator)
    spread = torch.rand(count, d_model // GROUP_SIZE, generator=generator) + 0.5
    # Codes are uniform: their variance is (4^bits - 1) / 12.
    scales = spread * (12 / (4**bits - 1) / d_model) ** 0.5
    zeros = -scales * (2**bits - 1) / 2
    return PackedRows(bits, words, scales.half(), zeros.half())
