"""Compressed checkpoints with chosen widths, and the original model with the same rows zeroed.

Both are made without camera-serve's pipeline, reader or writer, so they can judge them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from camera_serve.models import MoeStructure, describe
from camera_serve.models.modules import layer_stack
from camera_serve.models.registration import register_models
from tests import tiny_models

Widths = Callable[[int, int], int]
"""The width an expert keeps, from its number and its original d_ff; shared experts are -1."""

Kept = dict[str, torch.Tensor]
"""Kept micro-experts in stored order, by expert prefix (`model.layers.1.mlp.experts.3`)."""

RECIPE = {
    "version": 1,
    "plan": {"tiers": [{"bits": 16, "fraction": 0.5}, {"bits": 0, "fraction": 0.5}]},
    "calibration": {"source": "test"},
    "align": 1,
}


def hostile(expert: int, d_ff: int) -> int:
    """Widths 0, 1, odd, and the whole d_ff."""
    if expert < 0:
        return 37
    return (0, 1, 17, d_ff, 33, 2, d_ff - 1, 8)[expert % 8]


def prune(dense: Path, output: Path, widths: Widths = hostile, *, seed: int = 0) -> Kept:
    """Write a compressed copy of the checkpoint `dense` with random rows kept, and say which."""
    structure = structure_of(dense)
    generator = torch.Generator().manual_seed(seed)
    tensors = one_by_one(dense)
    kept: Kept = {}
    layers = {}
    for layer in structure.moe_layers:
        prefix = structure.moe_prefix(layer)
        counts: dict[str, list[list[int]]] = {"experts": [], "shared": []}
        for expert, name, d_ff in _experts(structure, layer):
            width = widths(expert, d_ff)
            kept[name] = torch.randperm(d_ff, generator=generator)[:width]
            counts["shared" if expert < 0 else "experts"].append([width])
            _cut(tensors, name, _projections(structure, expert), kept[name])
        layers[prefix] = counts
    shutil.copytree(dense, output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "camera",
        "format": 1,
        "group_size": 128,
        "bits": [16],
        "layers": layers,
        "recipe": RECIPE,
    }
    (output / "config.json").write_text(json.dumps(config))
    (output / "hf_quant_config.json").write_text('{"quant_method": "camera"}')
    return kept


@torch.no_grad()
def zeroed(dense: Path, kept: Kept, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model of `dense`, every micro-expert that was not kept set to zero."""
    structure = structure_of(dense)
    model = tiny_models.load(dense, dtype=dtype, experts_implementation="eager")
    for layer in structure.moe_layers:
        moe = moe_of(model, structure, layer)
        for expert, name, d_ff in _experts(structure, layer):
            gone = torch.ones(d_ff, dtype=torch.bool)
            gone[kept[name]] = False
            if expert < 0:
                mlp = getattr(moe, structure.modules.shared_name)
                mlp.gate_proj.weight[gone] = 0
                mlp.up_proj.weight[gone] = 0
                mlp.down_proj.weight[:, gone] = 0
            else:
                moe.experts.gate_up_proj[expert, gone.repeat(2)] = 0
                moe.experts.down_proj[expert][:, gone] = 0
    return model


def moe_of(model: nn.Module, structure: MoeStructure, layer: int) -> Any:
    """The MoE block of one layer in transformers' own model."""
    modules = structure.modules
    return layer_stack(model, modules).layers[layer].get_submodule(modules.moe_name)


def one_by_one(dense: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by the names of a compressed one: no two experts in one tensor."""
    structure = structure_of(dense)
    files = sorted(dense.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tensors = single_experts(tensors)
    if structure.layer_prefix(0).startswith("model.layers"):
        tensors = {n.replace("model.language_model.", "model."): t for n, t in tensors.items()}
    for layer in structure.moe_layers:
        experts = f"{structure.moe_prefix(layer)}.experts"
        if f"{experts}.down_proj" not in tensors:
            continue
        gate_up, down = (tensors.pop(f"{experts}.{name}") for name in ("gate_up_proj", "down_proj"))
        if gate_up.shape[1] != 2 * structure.d_ff:
            gate_up, down = gate_up.mT, down.mT
        gate, up = gate_up.chunk(2, dim=1)
        for name, stacked in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            for expert, weight in enumerate(stacked):
                tensors[f"{experts}.{expert}.{name}.weight"] = weight.contiguous()
    return tensors


def structure_of(checkpoint: Path) -> MoeStructure:
    """The MoE structure config.json describes."""
    register_models()
    return describe(AutoConfig.from_pretrained(checkpoint))


def _experts(structure: MoeStructure, layer: int) -> list[tuple[int, str, int]]:
    prefix = structure.moe_prefix(layer)
    experts = [(e, f"{prefix}.experts.{e}", structure.d_ff) for e in range(structure.num_experts)]
    if structure.shared_d_ff:
        experts.append((-1, structure.shared_expert_prefix(layer), structure.shared_d_ff))
    return experts


def _projections(structure: MoeStructure, expert: int) -> tuple[str, str, str]:
    return ("gate_proj", "up_proj", "down_proj") if expert < 0 else structure.family.projections


def single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tensor for each expert, also where a family's checkpoints have one for all (Granite)."""
    single: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".block_sparse_moe.")
        if part not in ("input_linear.weight", "output_linear.weight"):
            single[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            halves = matrix.chunk(2) if part.startswith("input") else [matrix]
            names = ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)
            for projection, half in zip(names, halves, strict=True):
                full = f"{prefix}.block_sparse_moe.experts.{expert}.{projection}.weight"
                single[full] = half.contiguous()
    return single


def _cut(
    tensors: dict[str, torch.Tensor],
    name: str,
    projections: tuple[str, str, str],
    kept: torch.Tensor,
) -> None:
    for index, projection in enumerate(projections):
        key = f"{name}.{projection}.weight"
        tensor = tensors.pop(key)
        narrow = tensor[:, kept] if index == 2 else tensor[kept]
        if narrow.numel():
            tensors[key] = narrow.contiguous()
