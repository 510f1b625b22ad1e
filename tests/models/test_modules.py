"""Experts that are more than plain SwiGLU, or lie elsewhere, are refused for what they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from camera_serve.errors import UnsupportedModelError
from camera_serve.models.modules import MoeModules, find_moe

D_MODEL, D_FF, NUM_EXPERTS = 16, 12, 4

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OTHER = "computes something else than silu"


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


class Experts(nn.Module):
    """Experts of transformers' interface, each one plain SwiGLU; subclasses are not."""

    def __init__(self, num_experts: int = NUM_EXPERTS, d_ff: int = D_FF) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ff, D_MODEL))
        self.down_proj = nn.Parameter(torch.empty(num_experts, D_MODEL, d_ff))

    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return both.chunk(2, dim=-1)

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate, up)

    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        gate, up = self.halves(x @ self.gate_up_proj[expert].T)
        return weights * (self.product(gate, up) @ self.down_proj[expert].T)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            tokens, choice = (ids == expert).nonzero(as_tuple=True)
            out[tokens] += self.weighed(x[tokens], expert, weights[tokens, choice, None])
        return out


def with_product(product: Product) -> type[Experts]:
    return type("Other", (Experts,), {"product": lambda self, gate, up: product(gate, up)})


class Interleaved(Experts):
    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return both[..., ::2], both[..., 1::2]


class UpFirst(Experts):
    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return both.chunk(2, dim=-1)[::-1]


class WeightOnInput(Experts):
    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        return super().weighed(weights * x, expert, torch.ones_like(weights))


class WithoutWeights(Experts):
    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        return super().weighed(x, expert, torch.ones_like(weights))


class HandsOn(Experts):
    """Adds what it was given, as an expert between residuals of its own."""

    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        return x + super().weighed(x, expert, weights)


class Normed(Experts):
    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        return super().weighed(functional.rms_norm(x, x.shape[-1:]), expert, weights)


class Transposed(Experts):
    """As gpt-oss holds them, which says so."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.mT.contiguous()))

    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        gate, up = self.halves(x @ self.gate_up_proj[expert])
        return weights * (self.product(gate, up) @ self.down_proj[expert])


class SilentlyTransposed(Transposed):
    is_transposed = False


class Biased(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.empty(NUM_EXPERTS, 2 * D_FF))


class Scaled(Experts):
    """Has a number for each expert, where no parameter tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(NUM_EXPERTS))

    def weighed(self, x: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        return self.get_buffer("scale")[expert] * super().weighed(x, expert, weights)


class Ungated(Experts):
    def __init__(self) -> None:
        super().__init__()
        del self.gate_up_proj
        self.up_proj = nn.Parameter(torch.empty(NUM_EXPERTS, D_FF, D_MODEL))


class WithZeroExperts(Experts):
    """Has more columns in one weight than in the other, as experts that do nothing add them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(NUM_EXPERTS + 2, 2 * D_FF, D_MODEL))


class Mlp(nn.Module):
    """A shared expert."""

    def __init__(self, d_ff: int = D_FF, product: Product = swiglu, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D_MODEL, d_ff, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(d_ff, D_MODEL, bias=bias)
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


class Model(nn.Module):
    """Decoder layers whose `mlp` has the given parts."""

    def __init__(self, *layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, D_MODEL)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict(p)}) for p in layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


def found(*layers: Callable[[], dict[str, nn.Module]]) -> MoeModules | None:
    """What is found in a model of these MoE layers, on the meta device."""
    with torch.device("meta"):
        model = nn.ModuleDict({"model": Model(*(layer() for layer in layers))})
    return find_moe(model, D_MODEL)


def refusal(*layers: Callable[[], dict[str, nn.Module]]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        found(*layers)
    return str(caught.value)


@pytest.mark.parametrize("experts", [Experts, Transposed])
def test_plain_swiglu_is_understood(experts: type[Experts]) -> None:
    wanted = MoeModules("model.layers", "model.embed_tokens", (1,), "mlp", NUM_EXPERTS, D_FF)
    assert found(dict, lambda: {"experts": experts()}) == wanted


def test_a_shared_expert_and_its_gate_are_found() -> None:
    shared = {"shared": (lambda: Mlp(5)), "gate": lambda: nn.Linear(D_MODEL, 1, bias=False)}
    modules = found(lambda: {"experts": Experts(), **{n: make() for n, make in shared.items()}})
    assert modules
    assert (modules.shared_name, modules.shared_gate_name) == ("shared", "gate")
    assert modules.shared_d_ff == 5


def test_a_model_without_experts_is_dense() -> None:
    assert found(dict, lambda: {"up_proj": nn.Linear(D_MODEL, D_FF)}) is None


PRODUCTS: dict[str, Product] = {
    "gelu": lambda gate, up: functional.gelu(gate) * up,
    "gelu, approximated": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    "relu squared": lambda gate, up: functional.relu(gate) ** 2 * up,
    "the gate is limited": lambda gate, up: swiglu(gate.clamp(max=7.0), up),
    "both are limited": lambda gate, up: swiglu(gate.clamp(max=50.0), up.clamp(-50.0, 50.0)),
    "the product is limited": lambda gate, up: swiglu(gate, up).clamp(-100.0, 100.0),
    "up plus one": lambda gate, up: swiglu(gate, up + 1),
    "a steeper sigmoid": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "up is not used": lambda gate, _: functional.silu(gate),
    "no activation": lambda gate, up: gate * up,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_product_is_refused(name: str) -> None:
    experts = with_product(PRODUCTS[name])
    assert OTHER in refusal(lambda: {"experts": experts()})


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_product_in_a_shared_expert_is_refused(name: str) -> None:
    said = refusal(lambda: {"experts": Experts(), "shared": Mlp(product=PRODUCTS[name])})
    assert "layers.0.mlp.shared computes something else" in said


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (Interleaved, OTHER),
        (UpFirst, OTHER),
        (WeightOnInput, OTHER),
        (WithoutWeights, OTHER),
        (HandsOn, OTHER),
        (Normed, OTHER),
        (SilentlyTransposed, "gate_up_proj [4, 16, 24], down_proj [4, 12, 16]: wanted"),
        (Biased, "gate_up_proj_bias [4, 24]: wanted gate_up_proj"),
        (Scaled, "model.layers.0.mlp.experts is no SwiGLU that can be tried alone"),
        (Ungated, "up_proj [4, 12, 16]: wanted gate_up_proj"),
        (WithZeroExperts, "gate_up_proj [6, 24, 16], down_proj [4, 16, 12]"),
    ],
)
def test_experts_of_another_form_are_refused(experts: type[Experts], reason: str) -> None:
    assert reason in refusal(lambda: {"experts": experts()})


def test_a_limit_in_the_last_layer_alone_is_refused_there() -> None:
    limited = with_product(PRODUCTS["both are limited"])
    said = refusal(lambda: {"experts": Experts()}, lambda: {"experts": limited()})
    assert said.startswith("model.layers.1.mlp.experts computes something else")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda: {"shared": Mlp(bias=True)}, "layers.0.mlp.shared.gate_proj has a bias"),
        (lambda: {"one": Mlp(), "two": Mlp()}, "has the dense parts one, two: wanted one shared"),
        (lambda: {"gate": nn.Linear(D_MODEL, 1)}, "has the dense parts gate: wanted one shared"),
    ],
)
def test_dense_parts_of_another_form_are_refused(
    parts: Callable[[], dict[str, nn.Module]], reason: str
) -> None:
    assert reason in refusal(lambda: {"experts": Experts(), **parts()})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: {"experts": Experts(d_ff=8)}, "4 experts of d_ff 8"),
        (lambda: {"experts": Experts(num_experts=3)}, "3 experts of d_ff 12"),
        (lambda: {"experts": Experts(), "shared": Mlp(5)}, "4 experts of d_ff 12, shared of 5"),
    ],
)
def test_layers_that_are_not_alike_are_refused(
    other: Callable[[], dict[str, nn.Module]], what: str
) -> None:
    said = refusal(lambda: {"experts": Experts()}, other)
    assert said.startswith(f"model.layers.1.mlp ({what}) differs from model.layers.0.mlp")


@pytest.mark.parametrize("where", ["model.experts", "model.layers.0.experts", "blocks.0.experts"])
def test_experts_outside_a_block_of_a_layer_are_no_dense_model(where: str) -> None:
    with torch.device("meta"):
        model: nn.Module = Experts()
    for name in reversed(where.split(".")):
        model = nn.ModuleDict({name: model})
    with pytest.raises(UnsupportedModelError, match=f"the experts {where} are not in a block"):
        find_moe(model, D_MODEL)


_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "pad_token_id": 2,
}
REAL: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": ({"num_local_experts": 4, "intermediate_size": 32}, "gate_up_proj_bias"),
    "llama4_text": ({"num_local_experts": 4, "intermediate_size": 32}, "wanted gate_up_proj"),
    "gemma4_text": (
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "intermediate_size": 32}
        | {"moe_intermediate_size": 32, "head_dim": 32},
        "not in a block of a decoder layer",
    ),
    "deepseek_v4": ({"n_routed_experts": 4, "moe_intermediate_size": 32}, OTHER),
    "nemotron_h": (
        {"n_routed_experts": 4, "moe_intermediate_size": 32, "layers_block_type": ["moe"] * 3},
        r"hold up_proj .*: wanted gate_up_proj",
    ),
    "hy_v4": ({"num_experts": 4, "moe_intermediate_size": 32}, OTHER),
    "minimax_m3_vl_text": ({"num_local_experts": 4, "intermediate_size": 32}, OTHER),
    "longcat_flash": (
        {"n_routed_experts": 4, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
        r"gate_up_proj \[6, .*down_proj \[4, ",
    ),
}


@pytest.mark.parametrize("model_type", REAL)
def test_families_of_transformers_are_refused_for_what_they_are(model_type: str) -> None:
    settings, reason = REAL[model_type]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = AutoConfig.for_model(model_type, **_SIZES, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=reason):
        find_moe(model, config.hidden_size)
