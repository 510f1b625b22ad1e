"""The MoE structure of one model: which layers hold experts, how wide, and under which names."""

from dataclasses import dataclass
from typing import Any, Literal

from camera_serve.errors import UnsupportedModelError
from camera_serve.models.families import FAMILIES, MOST, Config, Family, whole

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class MoeStructure:
    """Sizes and checkpoint names of a model's MoE layers.

    `d_ff` and `shared_d_ff` are the original widths (`shared_d_ff` 0: no shared expert);
    `moe_layers` are the decoder layers that hold experts.
    """

    family: Family
    num_layers: int
    moe_layers: tuple[int, ...]
    d_model: int
    d_ff: int
    shared_d_ff: int
    num_experts: int
    top_k: int

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3`: the checkpoint prefix of a decoder layer."""
        return f"model.layers.{layer}"

    def moe_prefix(self, layer: int) -> str:
        """`model.layers.3.mlp`: the checkpoint prefix of a MoE layer, its key in the layout."""
        return f"{self.layer_prefix(layer)}.{self.family.moe_name}"

    def projection_name(self, projection: Projection) -> str:
        """`gate_proj`, or `w1` where the family says so."""
        return self.family.projections[PROJECTIONS.index(projection)]

    def expert_prefix(self, layer: int, expert: int, projection: Projection) -> str:
        """`model.layers.3.mlp.experts.7.gate_proj`: the checkpoint prefix of one projection."""
        name = self.projection_name(projection)
        return f"{self.moe_prefix(layer)}.experts.{expert}.{name}"

    def shared_prefix(self, layer: int, projection: Projection) -> str:
        """`model.layers.3.mlp.shared_expert.gate_proj`; shared experts never use w1/w2/w3."""
        return f"{self.moe_prefix(layer)}.{self.family.shared_name}.{projection}_proj"

    def expert_prefixes(self) -> tuple[str, ...]:
        """Checkpoint prefixes of everything CAMERA compresses: experts and shared experts."""
        parts = ("experts", self.family.shared_name) if self.shared_d_ff else ("experts",)
        return tuple(
            f"{self.moe_prefix(layer)}.{part}." for layer in self.moe_layers for part in parts
        )

    def to_hf_name(self, name: str) -> str:
        """The transformers parameter name of a checkpoint tensor name."""
        for old, new in self.family.hf_renames:
            name = name.replace(old, new)
        return name

    def to_checkpoint_name(self, name: str) -> str:
        """The checkpoint tensor name of a transformers parameter name."""
        for old, new in reversed(self.family.hf_renames):
            name = name.replace(new, old)
        return name

    @property
    def micro_experts_per_layer(self) -> int:
        """Micro-experts of one MoE layer, shared experts included (`N_e`, section 3.1)."""
        return self.num_experts * self.d_ff + self.shared_d_ff


def describe(config: Config) -> MoeStructure:
    """Read a transformers config into a `MoeStructure`.

    Raises `UnsupportedModelError` naming the architecture or setting that is not understood.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(_unknown_message(config))
    _check_architecture(config, family)
    _check_settings(config, family)
    layers = range(whole(config, "num_hidden_layers", most=MOST))
    moe_layers = tuple(i for i in layers if family.has_experts(config, i))
    has_experts = getattr(config, family.num_experts_key)
    num_experts = whole(config, family.num_experts_key, most=MOST) if has_experts else 0
    if not moe_layers or not num_experts:
        raise UnsupportedModelError(
            f"this {family.model_type} model has {num_experts} experts in {len(moe_layers)} of "
            f"{config.num_hidden_layers} layers: it is dense, and CAMERA compresses MoE layers only"
        )
    return MoeStructure(
        family=family,
        num_layers=len(layers),
        moe_layers=moe_layers,
        d_model=whole(config, "hidden_size"),
        d_ff=whole(config, family.d_ff_key),
        shared_d_ff=family.shared_d_ff(config),
        num_experts=num_experts,
        top_k=whole(config, "num_experts_per_tok", most=num_experts),
    )


def _unknown_message(config: Config) -> str:
    architectures = ", ".join(map(str, _architectures(config))) or "none named"
    return (
        f"model type {config.model_type!r} (architectures: {architectures}) is not supported: it "
        f"is a dense model, or its MoE layer is not understood; supported: {', '.join(FAMILIES)}"
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
                f"architecture {name!r} is not understood for model type {family.model_type!r}: "
                f"wanted {' or '.join(family.architectures)}"
            )


def _check_settings(config: Config, family: Family) -> None:
    _refuse_unless(config, family, "hidden_act", ("silu",))
    for key, values in family.understood:
        _refuse_unless(config, family, key, values)


def _refuse_unless(config: Config, family: Family, key: str, values: tuple[Any, ...]) -> None:
    value = getattr(config, key, values[0])
    if value not in values:
        raise UnsupportedModelError(
            f"{family.model_type} with {key} = {value!r} is not understood: camera-serve "
            f"reproduces {key} in {list(values)} only"
        )
