"""Expert tensors <-> ragged rows: one expert's projection as it stands in a checkpoint.

A 16-bit tier is `.weight`; packed tiers are `.qweight` (int32, tiers one after another, each
micro-expert one bit string), `.scales` and `.zeros` (float16, a row per micro-expert).
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from camera_serve.checkpoint.format import Tiers, dense_layout
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.ragged.layer import PackedRows, QuantizedRows, RaggedLayer, RaggedTier, Rows
from camera_serve.ragged.packing import pack, words_per_row


def packed_tensors(
    prefix: str, rows: QuantizedRows, counts: Sequence[int], bits: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The packed tensors of one expert's projection.

    rows: its quantized micro-experts, tier by tier; counts, bits: of the packed tiers.
    """
    codes = rows.codes.split(list(counts))
    words = [pack(tier, b).flatten() for tier, b in zip(codes, bits, strict=True) if len(tier)]
    if not words:
        return {}
    return {
        f"{prefix}.qweight": torch.cat(words),
        f"{prefix}.scales": rows.scales,
        f"{prefix}.zeros": rows.zeros,
    }


def tier_rows(
    prefix: str,
    projection: Projection,
    tensors: Mapping[str, torch.Tensor],
    counts: Sequence[int],
    tiers: Tiers,
    d_model: int,
) -> list[Rows]:
    """One expert's projection as rows `[count, d_model]`, tier by tier: undoes `packed_tensors`."""
    empty = torch.empty(0)
    plain = tensors.get(f"{prefix}.weight", torch.empty(0, d_model))
    plain = plain.T if projection == "down" and len(plain) else plain
    words = tensors.get(f"{prefix}.qweight", empty.int())
    scales = tensors.get(f"{prefix}.scales", empty.half())
    zeros = tensors.get(f"{prefix}.zeros", empty.half())
    rows: list[Rows] = []
    word = row = 0
    for count, bits in zip(counts, tiers.bits, strict=True):
        if bits == 16:
            rows.append(plain)
            continue
        per_row = words_per_row(d_model, bits)
        own = words[word : word + count * per_row].view(count, per_row)
        groups = slice(row, row + count)
        shape = (count, d_model // tiers.group_size)
        packed = (own, scales[groups].view(shape), zeros[groups].view(shape))
        rows.append(PackedRows(bits, *packed))
        word, row = word + count * per_row, row + count
    return rows


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of several experts in one tier, one after another."""
    # An empty expert has no tensor, so its rows have no dtype of their own.
    parts = [part for part in parts if _num_rows(part)] or parts[:1]
    packed = [part for part in parts if isinstance(part, PackedRows)]
    if not packed:
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    return PackedRows(
        packed[0].bits,
        torch.cat([part.words for part in packed]),
        torch.cat([part.scales for part in packed]),
        torch.cat([part.zeros for part in packed]),
    )


def _num_rows(rows: Rows) -> int:
    return len(rows.words if isinstance(rows, PackedRows) else rows)


def read_experts(checkpoint: Checkpoint, layer: int) -> RaggedLayer:
    """The routed experts of one MoE layer, in their stored dtypes, packed tiers packed."""
    structure = checkpoint.structure
    prefixes = [
        {p: structure.expert_prefix(layer, expert, p) for p in PROJECTIONS}
        for expert in range(structure.num_experts)
    ]
    return _read(checkpoint, layer, prefixes, "experts")


def read_shared_experts(checkpoint: Checkpoint, layer: int) -> RaggedLayer:
    """The shared experts of one MoE layer, as a ragged layer of one expert."""
    prefix = {p: checkpoint.structure.shared_prefix(layer, p) for p in PROJECTIONS}
    return _read(checkpoint, layer, [prefix], "shared")


def _read(
    checkpoint: Checkpoint, layer: int, prefixes: list[dict[Projection, str]], kind: str
) -> RaggedLayer:
    structure, quantization = checkpoint.structure, checkpoint.quantization
    moe = structure.moe_prefix(layer)
    layout = quantization.layout(moe) if quantization else dense_layout(structure)
    tiers = quantization.tiers if quantization else Tiers((16,))
    counts = layout.experts if kind == "experts" else layout.shared
    matrices = {
        p: [
            tier_rows(prefix[p], p, _tensors(checkpoint, prefix[p]), own, tiers, structure.d_model)
            for prefix, own in zip(prefixes, counts, strict=True)
        ]
        for p in PROJECTIONS
    }
    checkpoint.release()
    ragged = []
    for tier in range(len(tiers.bits)):
        gate, up, down = (concatenate([e[tier] for e in matrices[p]]) for p in PROJECTIONS)
        offsets = tuple(accumulate((own[tier] for own in counts), initial=0))
        ragged.append(RaggedTier(gate, up, down, offsets))
    return RaggedLayer(tuple(ragged))


def _tensors(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    names = [f"{prefix}.{part}" for part in ("weight", "qweight", "scales", "zeros")]
    return {name: checkpoint.get(name) for name in names if name in checkpoint.entries}
