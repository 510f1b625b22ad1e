"""How far activations in steps of 1/127 are from what they stand for, and who chooses them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch

from camera_serve.errors import KernelError
from camera_serve.kernels.cpu import (
    activations,
    isa,
    pack_layer,
    ragged_moe,
    use_activations,
    use_isa,
)
from camera_serve.ragged.layer import RaggedLayer
from tests.kernels.test_cpu import error_of, in_float64, make_layer, random_x, route, turned

BITS = [(4,), (3,), (2,), (1,), (3, 2, 1), (16, 3, 1)]
# x and h are each off by 1/127 of the largest in a group over the square root of 12: 0.7% of the
# RMS where the largest is three times that. Twice, as gate and up share it, and h with its long
# tail, whose largest is six to eight times its RMS: 1.4% and 1.6%.
ORDINARY_ERROR = 0.025


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    best = isa()
    yield
    use_activations("auto")
    use_isa(best)


def both(
    layer: RaggedLayer, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    found, packed = {}, pack_layer(layer)
    for name in ("int8", "bf16"):
        use_activations(name)
        found[name] = ragged_moe(x, weights, ids, packed)
    return found


@pytest.mark.parametrize("bits", BITS, ids=lambda bits: "+".join(map(str, bits)))
@pytest.mark.parametrize(("d_model", "group"), [(256, 32), (512, 128), (512, 512)])
def test_ordinary_activations_lose_at_most_2_5_percent(
    d_model: int, group: int, bits: Sequence[int]
) -> None:
    layer = make_layer(turned([160, 96, 33], len(bits)), bits, d_model, group)
    for num_tokens in (1, 9, 70):
        x, (weights, ids) = random_x(num_tokens, d_model), route(num_tokens, 3)
        found = both(layer, x, weights, ids)
        assert not found["int8"].equal(found["bf16"])
        assert error_of(found["int8"], in_float64(x, weights, ids, layer)) <= ORDINARY_ERROR


@pytest.mark.parametrize("bits", [(3, 2, 1), (4,)], ids=lambda bits: "+".join(map(str, bits)))
@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize("size", [100, 1000, 10000])
def test_a_token_with_a_spike_in_x_is_computed_in_bf16(
    size: int, group: int, bits: Sequence[int]
) -> None:
    layer = make_layer(turned([160, 96, 33], len(bits)), bits, 512, group)
    x, (weights, ids) = random_x(9, 512), route(9, 3)
    spiky = [1, 4, 7]
    x[spiky, torch.tensor([5, 300, 511])] = float(size)
    found = both(layer, x, weights, ids)
    assert found["int8"][spiky].equal(found["bf16"][spiky])
    wanted, others = in_float64(x, weights, ids, layer), [0, 2, 3, 5, 6, 8]
    assert error_of(found["int8"][others], wanted[others]) <= ORDINARY_ERROR


@pytest.mark.parametrize("bits", [(3, 2, 1), (4,)], ids=lambda bits: "+".join(map(str, bits)))
@pytest.mark.parametrize("size", [100, 1000, 10000])
def test_a_spike_in_the_hidden_activations_costs_no_more_than_bf16(
    size: int, bits: Sequence[int]
) -> None:
    layer = make_layer(turned([160, 96, 64], len(bits)), bits, 512, 128)
    # One micro-expert of expert 0 answers far above the others, for every token it gets.
    for tier in layer.tiers[:1]:
        for part in (tier.up.scales, tier.up.zeros):
            part[3] *= size
    x, ids = random_x(9, 512), torch.zeros(9, 1, dtype=torch.int32)
    weights = torch.rand(9, 1)
    found = both(layer, x, weights, ids)
    wanted = in_float64(x, weights, ids, layer)
    assert wanted.isfinite().all()
    assert error_of(found["int8"], wanted) <= max(
        ORDINARY_ERROR, 2 * error_of(found["bf16"], wanted)
    )


def test_what_a_token_gives_does_not_depend_on_the_others() -> None:
    layer = pack_layer(make_layer(turned([96, 33], 3), (3, 2, 1), 256, 64))
    x, (weights, ids) = random_x(20, 256), route(20, 2)
    x[3, 7] = 5000.0
    use_activations("int8")
    together = ragged_moe(x, weights, ids, layer)
    for token in range(20):
        own = slice(token, token + 1)
        assert ragged_moe(x[own], weights[own], ids[own], layer).equal(together[own])


def test_instruction_sets_agree_on_the_integers() -> None:
    layer = pack_layer(make_layer(turned([96, 33], 3), (3, 2, 1), 256, 64))
    x, (weights, ids) = random_x(20, 256), route(20, 2)
    use_activations("int8")
    found = []
    for name in ("avx512_bf16", "avx2", "portable"):
        try:
            use_isa(name)
        except KernelError:
            continue
        found.append(ragged_moe(x, weights, ids, layer).double())
    for other in found[1:]:
        # A code apart would be 1/127; sums in another order, and the last rounding, are not.
        assert (other - found[0]).norm() <= 2**-9 * found[0].norm()


def test_an_unknown_choice_is_refused_by_name() -> None:
    with pytest.raises(KernelError, match="CAMERA_SERVE_CPU_ACTIVATIONS is 'int4', wanted auto"):
        use_activations("int4")


@pytest.mark.parametrize(
    ("value", "chosen"), [("auto", "bf16"), ("int8", "int8"), ("bf16", "bf16"), (None, "bf16")]
)
def test_the_variable_chooses(value: str | None, chosen: str) -> None:
    program = "from camera_serve.kernels.cpu import activations; print(activations())"
    environment = {k: v for k, v in os.environ.items() if k != "CAMERA_SERVE_CPU_ACTIVATIONS"}
    if value:
        environment["CAMERA_SERVE_CPU_ACTIVATIONS"] = value
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == chosen
    assert activations() == "bf16"
