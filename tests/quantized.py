"""Quantized checkpoints decoded without camera-serve: the original model with the same weights.

The bit strings are read as Python integers, so that this can judge packing, kernels and loaders.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import camera_serve
from camera_serve import Calibration, Recipe, TierPlan
from tests import tiny_models
from tests.pruning import moe_of, structure_of


def compress(dense: Path, output: Path, plan: str, *, align: int = 1, group_size: int = 32) -> None:
    """Compress a tiny model by `plan`, on little text."""
    text = output.with_name("calibration.txt")
    text.write_text(Path(__file__).read_text() * 4)
    recipe = Recipe.paper(
        plan=TierPlan.parse(plan),
        calibration=Calibration(source=str(text), samples=6, seq_len=128),
        align=align,
        group_size=group_size,
        dtype="float32",
    )
    camera_serve.compress(dense, output, recipe)


@torch.no_grad()
def dequantized(dense: Path, compressed: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model of `dense` with the weights that `compressed` stands for.

    Kept micro-experts fill each expert from its first row on; the rest is zero.
    """
    structure = structure_of(dense)
    config = json.loads((compressed / "config.json").read_text())["quantization_config"]
    tensors: dict[str, torch.Tensor] = {}
    for file in compressed.glob("*.safetensors"):
        tensors |= load_file(file)
    model = tiny_models.load(dense, dtype=dtype, experts_implementation="eager")
    for layer in structure.moe_layers:
        prefix = structure.moe_prefix(layer)
        counts: Any = config["layers"][prefix]
        moe = moe_of(model, structure, layer)
        for expert, tiers in enumerate(counts["experts"]):
            names = [f"{prefix}.experts.{expert}.{p}" for p in structure.family.projections]
            gate, up, down = (_rows(tensors, n, tiers, config, structure.d_model) for n in names)
            moe.experts.gate_up_proj[expert].zero_().unflatten(0, (2, -1))[0, : len(gate)] = gate
            moe.experts.gate_up_proj[expert].unflatten(0, (2, -1))[1, : len(up)] = up
            moe.experts.down_proj[expert].zero_()[:, : len(down)] = down.T
        for tiers in counts["shared"]:
            mlp = getattr(moe, structure.modules.shared_name)
            for name in ("gate_proj", "up_proj", "down_proj"):
                full = f"{structure.shared_expert_prefix(layer)}.{name}"
                rows = _rows(tensors, full, tiers, config, structure.d_model)
                weight = getattr(mlp, name).weight.zero_()
                (weight.T if name == "down_proj" else weight)[: len(rows)] = rows
    return model


def _rows(
    tensors: dict[str, torch.Tensor], name: str, tiers: list[int], config: dict, d_model: int
) -> torch.Tensor:
    """One projection of one expert, float32 `[d_ff_e, d_model]`, decoded code by code."""
    rows = []
    if f"{name}.weight" in tensors:
        weight = tensors[f"{name}.weight"]
        down = name.endswith(("down_proj", "w2"))
        rows += list((weight.T if down else weight).float())
    stream = tensors[f"{name}.qweight"].numpy().tobytes() if f"{name}.qweight" in tensors else b""
    done = packed = 0
    for count, bits in zip(tiers, config["bits"], strict=True):
        for _ in range(count if bits < 16 else 0):
            size = d_model * bits // 8
            number = int.from_bytes(stream[done : done + size], "little")
            codes = [(number >> (i * bits)) % 2**bits for i in range(d_model)]
            scales = tensors[f"{name}.scales"][packed].float().numpy().repeat(config["group_size"])
            zeros = tensors[f"{name}.zeros"][packed].float().numpy().repeat(config["group_size"])
            rows.append(torch.from_numpy(np.array(codes, dtype=np.float32) * scales + zeros))
            done, packed = done + size, packed + 1
    assert done == len(stream)
    return torch.stack(rows) if rows else torch.empty(0, d_model)
