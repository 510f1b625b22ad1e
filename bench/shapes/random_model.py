"""A model of a real shape with random bf16 weights, as a Hugging Face folder, shard by shard.

Every tensor is drawn from its own name, so that a compressed model's 16-bit micro-experts are the
dense model's own. Packed tiers hold random codes: they are there for their speed.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench import reference
from bench.shapes.published import Shape, layer_energies
from camera_serve.checkpoint.format import (
    MARKER,
    MARKER_FILE,
    CameraQuantizationConfig,
    LayerCounts,
    Shapes,
    checkpoint_shapes,
)
from camera_serve.checkpoint.reader import read_json
from camera_serve.checkpoint.workspace import whole_output
from camera_serve.checkpoint.writer import (
    copy_side_files,
    require_space,
    write_index,
    write_json,
    write_shard,
)
from camera_serve.errors import RecipeError
from camera_serve.models import MoeStructure, describe
from camera_serve.models.deepseek import register_deepseek
from camera_serve.models.families import FAMILIES
from camera_serve.models.structure import PROJECTIONS, Projection
from camera_serve.ranking.selection import LayerEnergies, Selection, select
from camera_serve.recipe import Recipe

STD = 0.02
EMBEDDING_STD = 1.0
"""Large, so that what a token is decides where it is routed, and not the mean of those before it:
untrained attention is nearly uniform."""

LARGEST_SHARE = 0.4
"""Of the tokens, for one expert: its logits must pass a threshold above their mean."""

Experts = dict[str, tuple[Projection, torch.Tensor, Sequence[int]]]
"""By prefix, a compressed projection: kept rows in stored order, and how many per tier."""


@dataclass(frozen=True)
class _Model:
    """A model to write: what config.json says, every tensor's shape, and what each layer is like.

    energies, selections: by decoder layer; `selections` and `quantization` only of a compressed
    model. `dense` are the shapes of the dense model.
    """

    config: dict[str, Any]
    structure: MoeStructure
    dense: Shapes
    shapes: Shapes
    energies: dict[int, LayerEnergies]
    selections: dict[int, Selection]
    quantization: CameraQuantizationConfig | None
    seed: int
    balanced: bool


def write_model(
    shape: Shape,
    output: Path,
    *,
    layers: int,
    vocab: int,
    recipe: Recipe | None = None,
    seed: int = 0,
    balanced: bool = False,
) -> int:
    """Write a dense model, or what `recipe` leaves of it, to a new folder; returns its bytes.

    Tokens follow `layer_energies`, so experts with more energy see more of them, unless
    `balanced`. One layer is in memory at a time. `output` appears whole or not at all. Raises
    `OutputError` when it exists, another run writes it or has begun it, or it cannot be written.
    """
    tokenizer, model = _tokenizer(vocab), _describe(shape, layers, vocab, recipe, seed, balanced)
    with whole_output(output, "bench.shapes") as folder:
        require_space(output.parent, 2 * sum(math.prod(shape) for shape in model.dense.values()))
        total = _write_shards(model, folder)
        copy_side_files(reference.MODEL, folder)
        write_json(folder / "tokenizer.json", tokenizer)
        config = model.config
        if model.quantization:
            write_json(folder / MARKER_FILE, MARKER)
            config = config | model.quantization.config_entries()
        write_json(folder / "config.json", config)
    return total


def _describe(
    shape: Shape, layers: int, vocab: int, recipe: Recipe | None, seed: int, balanced: bool
) -> _Model:
    register_deepseek()
    raw = _raw_config(shape, layers, vocab)
    config = AutoConfig.for_model(**raw)
    structure = describe(config)
    energies = {layer: layer_energies(shape, seed + layer) for layer in structure.moe_layers}
    selections, quantization = {}, None
    if recipe:
        assert recipe.plan
        selections = {i: select(e, recipe.plan, recipe.align) for i, e in energies.items()}
        quantization = _quantization(structure, selections, recipe)
        quantization.check(structure)
    dense = checkpoint_shapes(config, structure, None)
    shapes = checkpoint_shapes(config, structure, quantization)
    return _Model(raw, structure, dense, shapes, energies, selections, quantization, seed, balanced)


def _raw_config(shape: Shape, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": list(FAMILIES[shape.config["model_type"]].architectures[:1]),
        **shape.config,
        "hidden_size": shape.d_model,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }


def _quantization(
    structure: MoeStructure, selections: dict[int, Selection], recipe: Recipe
) -> CameraQuantizationConfig:
    layers = {
        structure.moe_prefix(layer): LayerCounts(
            experts=selection.layout.experts, shared=selection.layout.shared
        )
        for layer, selection in selections.items()
    }
    return CameraQuantizationConfig(
        bits=recipe.bits, group_size=recipe.group_size, layers=layers, recipe=recipe
    )


def _write_shards(model: _Model, folder: Path) -> int:
    """One shard per layer, then one for the rest; returns the bytes of all tensors."""
    layers = range(model.structure.num_layers)
    prefixes = [f"{model.structure.layer_prefix(layer)}." for layer in layers]
    shards = [[name for name in model.shapes if name.startswith(p)] for p in prefixes]
    shards.append([name for name in model.shapes if not name.startswith(tuple(prefixes))])
    files: dict[str, list[str]] = {}
    total = 0
    for number, names in enumerate(shards):
        experts = _experts(model, number) if number in model.selections else {}
        tensors = {name: _tensor(model, number, name, experts) for name in names}
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, tensors)
        files[file] = names
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, files, total)
    return total


def _experts(model: _Model, layer: int) -> Experts:
    structure, selection = model.structure, model.selections[layer]
    experts: Experts = {}
    for p in PROJECTIONS:
        routed = zip(selection.experts, selection.layout.experts, strict=True)
        for expert, (rows, counts) in enumerate(routed):
            experts[structure.expert_prefix(layer, expert, p)] = (p, rows, counts)
        for rows, counts in zip(selection.shared, selection.layout.shared, strict=True):
            experts[structure.shared_prefix(layer, p)] = (p, rows, counts)
    return experts


def _tensor(model: _Model, layer: int, name: str, experts: Experts) -> torch.Tensor:
    prefix, _, part = name.rpartition(".")
    if part != "weight" and prefix in experts:
        assert model.quantization
        return _packed(name, model.shapes[name], experts[prefix][2], model.quantization.bits)
    if "norm" in prefix:
        return torch.ones(model.shapes[name], dtype=torch.bfloat16)
    if part == "bias":
        return torch.zeros(model.shapes[name], dtype=torch.bfloat16)
    std = EMBEDDING_STD if "embed_tokens" in prefix else STD
    weights = torch.empty(model.dense[name], dtype=torch.bfloat16)
    weights.normal_(0, std, generator=_generator(f"{model.seed} {name}"))
    if prefix in experts:
        projection, rows, _ = experts[prefix]
        plain = model.shapes[name][int(projection == "down")]
        return weights.index_select(int(projection == "down"), rows[:plain])
    if layer in model.energies and prefix == f"{model.structure.moe_prefix(layer)}.gate":
        return weights * (1 if model.balanced else _router_gains(model, layer))
    return weights


def _packed(
    name: str, shape: tuple[int, ...], counts: Sequence[int], bits: Sequence[int]
) -> torch.Tensor:
    """Random codes, or a grid under which their weights have the standard deviation `STD`."""
    if name.endswith(".qweight"):
        words = torch.empty(shape, dtype=torch.int32)
        return words.random_(-(2**31), 2**31, generator=_generator(name))
    packed = [(count, b) for count, b in zip(counts, bits, strict=True) if b < 16]
    widths = torch.tensor([count for count, _ in packed])
    # 2**b equally likely codes have the variance (4**b - 1) / 12.
    scales = [STD * math.sqrt(12 / (4**b - 1)) for _, b in packed]
    zeros = [-scale * (2**b - 1) / 2 for scale, (_, b) in zip(scales, packed, strict=True)]
    values = torch.tensor(scales if name.endswith(".scales") else zeros)
    return values.repeat_interleave(widths).half()[:, None].expand(shape)


def _router_gains(model: _Model, layer: int) -> torch.Tensor:
    """How much each expert's router row is scaled so that it sees its share of the tokens.

    An expert is taken for its logit, normal and of this standard deviation, passing a threshold
    that all experts share. Returns bfloat16 `[num_experts, 1]`.
    """
    top_k, num_experts = model.structure.top_k, model.structure.num_experts
    tokens = model.energies[layer].tokens.double()
    shares = (top_k * tokens / tokens.sum()).clamp(1e-4, LARGEST_SHARE)
    threshold = torch.special.ndtri(torch.tensor(1 - top_k / num_experts, dtype=torch.float64))
    return (threshold / torch.special.ndtri(1 - shares)).bfloat16()[:, None]


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _tokenizer(vocab: int) -> dict[str, Any]:
    """The reference MoE's tokenizer with pairs of its tokens merged until it has `vocab` tokens."""
    tokenizer = read_json(reference.MODEL / "tokenizer.json")
    known, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    if vocab < len(known):
        raise RecipeError(f"--vocab {vocab}: the tokenizer alone has {len(known)} tokens")
    special = {token["content"] for token in tokenizer["added_tokens"]}
    plain = [token for token in known if token not in special]
    for left, right in product(plain, plain):
        if len(known) == vocab:
            break
        if left + right not in known:
            known[left + right] = len(known)
            merges.append([left, right])
    return tokenizer
