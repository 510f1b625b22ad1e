"""The MoE structure of one model: which layers hold experts, how wide, and under which names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from camera_serve.errors import UnsupportedModelError
from camera_serve.models.building import build_on_meta
from camera_serve.models.coverage import why_not
from camera_serve.models.families import (
    FAMILIES,
    IN_VLLM,
    MOST,
    Config,
    Family,
    require_transformers,
    whole,
)
from camera_serve.models.modules import MoeModules, find_moe

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What families call the number of routed experts; 0 is a dense model."""


@dataclass(frozen=True)
class MoeStructure:
    """Sizes and checkpoint names of a model's MoE layers.

    `d_ff` and `shared_d_ff` are the original widths (`shared_d_ff` 0: no shared expert);
    `moe_layers` are the decoder layers that hold experts; `modules` is where transformers has them.
    `draft_patterns` are of what published checkpoints hold and transformers' model does not: parts
    that draft tokens.
    """

    family: Family
    model_type: str
    modules: MoeModules
    num_layers: int
    d_model: int
    top_k: int
    draft_patterns: tuple[str, ...] = ()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that hold experts."""
        return self.modules.moe_layers

    @property
    def num_experts(self) -> int:
        """Routed experts of each MoE layer."""
        return self.modules.num_experts

    @property
    def d_ff(self) -> int:
        """Micro-experts of each routed expert."""
        return self.modules.d_ff

    @property
    def shared_d_ff(self) -> int:
        """Micro-experts of the shared expert; 0 where there is none."""
        return self.modules.shared_d_ff

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3`: the checkpoint prefix of a decoder layer."""
        return self.to_checkpoint_name(f"{self.modules.layers_name}.{layer}.").removesuffix(".")

    def moe_prefix(self, layer: int) -> str:
        """`model.layers.3.mlp`: the checkpoint prefix of a MoE layer, its key in the layout."""
        return self.to_checkpoint_name(self._moe_module(layer, "")).removesuffix(".")

    @property
    def embedding_name(self) -> str:
        """`model.embed_tokens.weight`: the checkpoint name of the token embeddings."""
        return self.to_checkpoint_name(f"{self.modules.embedding_name}.weight")

    def layer_number(self, name: str) -> int | None:
        """The decoder layer a checkpoint tensor belongs to, be it past the last; None: none."""
        match = self._in_a_layer.match(name)
        return int(match[1]) if match else None

    def layer_of(self, moe_prefix: str) -> int | None:
        """The layer, be it past the last, of a MoE block's checkpoint prefix; None for others."""
        layer = self.layer_number(f"{moe_prefix}.")
        return layer if layer is not None and self.moe_prefix(layer) == moe_prefix else None

    @cached_property
    def _in_a_layer(self) -> re.Pattern[str]:
        prefix = self.to_checkpoint_name(f"{self.modules.layers_name}.")
        return re.compile(re.escape(prefix) + r"(\d+)\.")

    def projection_name(self, projection: Projection) -> str:
        """`gate_proj`, or `w1` where the family says so."""
        return self.family.projections[PROJECTIONS.index(projection)]

    def expert_prefix(self, layer: int, expert: int, projection: Projection) -> str:
        """`model.layers.3.mlp.experts.7.gate_proj`: the checkpoint prefix of one projection."""
        name = self.projection_name(projection)
        return f"{self.moe_prefix(layer)}.experts.{expert}.{name}"

    def shared_expert_prefix(self, layer: int) -> str:
        """`model.layers.3.mlp.shared_expert`: the checkpoint prefix of the shared expert."""
        shared = self._moe_module(layer, f"{self.modules.shared_name}.")
        return self.to_checkpoint_name(shared).removesuffix(".")

    @property
    def shared_expert_name(self) -> str:
        """`shared_expert`: what the checkpoint calls the shared expert of a MoE layer; "": none."""
        if not self.modules.shared_name:
            return ""
        return self.shared_expert_prefix(self.moe_layers[0]).rpartition(".")[2]

    def shared_prefix(self, layer: int, projection: Projection) -> str:
        """`model.layers.3.mlp.shared_expert.gate_proj`; shared experts never use w1/w2/w3."""
        return f"{self.shared_expert_prefix(layer)}.{projection}_proj"

    def is_draft(self, name: str) -> bool:
        """Whether transformers' model has no place for a checkpoint tensor of its family.

        So it is with what drafts the next tokens: a layer past the last one, or a part beside them.
        """
        layer = self.layer_number(name)
        if layer is not None:
            return layer >= self.num_layers
        return any(re.search(pattern, self.to_hf_name(name)) for pattern in self.draft_patterns)

    def is_routed_expert(self, name: str) -> bool:
        """Whether a checkpoint tensor is one of a routed expert: of 7, not of all of them."""
        layer = self.layer_number(name)
        if layer not in self.moe_layers:
            return False
        return bool(re.match(rf"{re.escape(self.moe_prefix(layer))}\.experts\.\d+\.", name))

    def is_expert(self, name: str) -> bool:
        """Whether a checkpoint tensor is one of those that CAMERA compresses."""
        layer = self.layer_number(name)
        if not self.shared_d_ff or layer not in self.moe_layers:
            return self.is_routed_expert(name)
        shared = f"{self.shared_expert_prefix(layer)}."
        return name.startswith(shared) or self.is_routed_expert(name)

    def expert_modules(self) -> tuple[str, ...]:
        """`model.layers.3.mlp.experts.`, …: transformers' names of all that CAMERA compresses."""
        parts = ("experts.", f"{self.modules.shared_name}.") if self.shared_d_ff else ("experts.",)
        return tuple(self._moe_module(layer, part) for layer in self.moe_layers for part in parts)

    def to_hf_name(self, name: str) -> str:
        """The transformers parameter name of a checkpoint tensor name."""
        for old, new in self.family.hf_renames:
            name = name.replace(old, new)
        return _with_prefix(name, self.family.hf_prefixes)

    def to_checkpoint_name(self, name: str) -> str:
        """The checkpoint tensor name of a transformers parameter name."""
        for old, new in reversed(self.family.hf_renames):
            name = name.replace(new, old)
        return _with_prefix(name, [(new, old) for old, new in self.family.hf_prefixes])

    def moe_module(self, layer: int) -> str:
        """`model.layers.3.mlp`: the transformers module name of a MoE layer."""
        return self._moe_module(layer, "").removesuffix(".")

    def _moe_module(self, layer: int, part: str) -> str:
        """The transformers name of a part of a MoE layer."""
        return f"{self.modules.layers_name}.{layer}.{self.modules.moe_name}.{part}"

    @property
    def micro_experts_per_layer(self) -> int:
        """Micro-experts of one MoE layer, shared experts included (`N_e`, section 3.1)."""
        return self.num_experts * self.d_ff + self.shared_d_ff


def _with_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def describe(config: Config) -> MoeStructure:
    """Find the MoE structure of a transformers config, in transformers' own model of it.

    Raises `UnsupportedModelError` naming the architecture or setting that is not understood,
    `CheckpointError` for a config that transformers builds no model from, `LibraryError` for a
    transformers that is too old for the family.
    """
    require_transformers(config.model_type)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(_unknown_message(config))
    _check_architecture(config, family)
    text = config.get_text_config()
    if any(_is_none(text, key) for key in COUNTS):
        raise _dense(config)
    _check_settings(text, config.model_type, family)
    _check_spelled_out(text, config.model_type, family)
    num_layers = whole(text, "num_hidden_layers", most=MOST)
    model = build_on_meta(config)
    modules = find_moe(model, whole(text, "hidden_size"))
    if modules is None:
        raise _dense(config)
    return MoeStructure(
        family=family,
        model_type=config.model_type,
        modules=modules,
        num_layers=num_layers,
        d_model=text.hidden_size,
        top_k=whole(text, family.top_k_key, most=modules.num_experts),
        draft_patterns=tuple(sorted(model._keys_to_ignore_on_load_unexpected or ())),
    )


def _is_none(text: Config, key: str) -> bool:
    value = getattr(text, key, None)
    return value == 0 and not isinstance(value, bool)


def _dense(config: Config) -> UnsupportedModelError:
    layers = config.get_text_config().num_hidden_layers
    return UnsupportedModelError(
        f"this {config.model_type} model has experts in none of {layers} layers: it is dense, and "
        "CAMERA compresses MoE layers only"
    )


def _unknown_message(config: Config) -> str:
    architectures = ", ".join(map(str, _architectures(config))) or "none named"
    return (
        f"model type {config.model_type!r} (architectures: {architectures}) is not supported: "
        f"{why_not(config)}; supported: {', '.join(FAMILIES)}"
    )


def _architectures(config: Config) -> list[Any]:
    names = config.architectures or []
    if not isinstance(names, list):
        raise UnsupportedModelError(
            f"architectures is {names!r:.100} in config.json: wanted a list"
        )
    return names


def _check_architecture(config: Config, family: Family) -> None:
    for name in _architectures(config):
        if name not in family.architectures:
            raise UnsupportedModelError(
                f"architecture {name!r} is not understood for model type {config.model_type!r}: "
                f"wanted {' or '.join(family.architectures)}"
            )


def _check_settings(text: Config, model_type: str, family: Family) -> None:
    for key in COUNTS:
        if getattr(text, key, None):
            whole(text, key, most=MOST)
    for key, values in (("hidden_act", ("silu",)), *family.understood):
        value = getattr(text, key, values[0])
        if value not in values:
            why = f"{IN_VLLM[key]}; " if key in IN_VLLM else ""
            raise UnsupportedModelError(
                f"{model_type} with {key} = {value!r:.100} is not understood: {why}camera-serve "
                f"reproduces {key} in {list(values)} only"
            )


def _check_spelled_out(text: Config, model_type: str, family: Family) -> None:
    for key, ours in family.settings_spelled_out(text).items():
        value = getattr(text, key, ours)
        if value != ours:
            raise UnsupportedModelError(
                f"{model_type} with {key} = {value!r:.100} is not understood: wanted "
                f"{ours!r:.100}, which vLLM takes for granted or transformers makes of other ones"
            )
