import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera_serve.ragged.layer import PackedRows, RaggedLayer, RaggedTier, dense_rows, ragged_moe
from camera_serve.ragged.packing import pack

D_MODEL = 16


def make_layer(widths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> RaggedLayer:
    generator = torch.Generator().manual_seed(seed)
    matrices = [
        torch.randn(sum(widths), D_MODEL, generator=generator).div(D_MODEL**0.5).to(dtype)
        for _ in range(3)
    ]
    offsets = torch.tensor([0, *widths]).cumsum(0).tolist()
    return RaggedLayer((RaggedTier(*matrices, offsets=tuple(offsets)),))


def by_definition(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: RaggedLayer
) -> torch.Tensor:
    """Eq. 5, one micro-expert of one token at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (chosen, share) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(chosen, share, strict=True):
            if not 0 <= expert < layer.num_experts:
                continue
            (tier,) = layer.tiers
            for row in range(tier.offsets[expert], tier.offsets[expert + 1]):
                gate = (tier.gate[row].double() @ x[token].double()).item()
                up = (tier.up[row].double() @ x[token].double()).item()
                silu = gate / (1 + torch.exp(torch.tensor(-gate, dtype=torch.float64)).item())
                out[token] += weight * silu * up * tier.down[row].double()
    return out


def route(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return torch.rand(num_tokens, top_k), ids.to(torch.int32)


HOSTILE = {
    "widths 0, 1 and odd": [0, 1, 7, 16],
    "one expert holds all": [0, 0, 33, 0],
    "nothing is left": [0, 0, 0, 0],
    "even widths": [8, 8, 8, 8],
}


@pytest.mark.parametrize("widths", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_it_is_eq_5_on_hostile_widths(widths: list[int], num_tokens: int) -> None:
    layer = make_layer(widths)
    x = torch.randn(num_tokens, D_MODEL)
    weights, ids = route(num_tokens, len(widths), top_k=2)
    out = ragged_moe(x, weights, ids, layer)
    # float32 dot products of 16 terms: a few roundings of 6e-8 on values of order 1.
    torch.testing.assert_close(
        out.double(), by_definition(x, weights, ids, layer), rtol=1e-5, atol=1e-5
    )


@given(
    widths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    num_tokens=st.integers(1, 6),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_it_is_eq_5_on_any_widths_and_routes(
    widths: list[int], num_tokens: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, len(widths)))
    layer = make_layer(widths)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, (weights, ids) = torch.randn(num_tokens, D_MODEL), route(num_tokens, len(widths), top_k)
    out = ragged_moe(x, weights, ids, layer)
    torch.testing.assert_close(
        out.double(), by_definition(x, weights, ids, layer), rtol=1e-5, atol=1e-5
    )


def test_all_tokens_on_one_expert() -> None:
    layer = make_layer([5, 3, 4])
    x, ids = torch.randn(20, D_MODEL), torch.full((20, 1), 1)
    out = ragged_moe(x, torch.ones(20, 1), ids, layer)
    (tier,) = layer.tiers
    rows = (tier.gate[5:8], tier.up[5:8], tier.down[5:8])
    one = RaggedLayer((RaggedTier(*rows, offsets=(0, 3)),))
    assert out.equal(ragged_moe(x, torch.ones(20, 1), torch.zeros(20, 1, dtype=torch.int64), one))


def test_ids_of_experts_held_elsewhere_add_nothing() -> None:
    layer = make_layer([4, 4])
    x, weights = torch.randn(3, D_MODEL), torch.rand(3, 2)
    ids = torch.tensor([[-1, 0], [1, 2], [-1, 7]])
    out = ragged_moe(x, weights, ids, layer)
    torch.testing.assert_close(
        out.double(), by_definition(x, weights, ids, layer), rtol=1e-5, atol=1e-5
    )
    assert out[2].equal(torch.zeros(D_MODEL))


def test_order_inside_an_expert_does_not_matter() -> None:
    layer = make_layer([6, 9])
    order = torch.cat([torch.randperm(6), 6 + torch.randperm(9)])
    (tier,) = layer.tiers
    rows = (tier.gate[order], tier.up[order], tier.down[order])
    shuffled = RaggedLayer((RaggedTier(*rows, tier.offsets),))
    x, (weights, ids) = torch.randn(8, D_MODEL), route(8, 2, 1)
    out, again = ragged_moe(x, weights, ids, layer), ragged_moe(x, weights, ids, shuffled)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_x_and_sums_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer([64] * 8, dtype)
    x, (weights, ids) = torch.randn(4, D_MODEL).to(dtype), route(4, 8, 8)
    out = ragged_moe(x, weights, ids, layer)
    wanted = by_definition(x, weights, ids, layer)
    assert out.dtype == dtype
    # gate, up and their product are rounded to `dtype` once each, the sum once more.
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_the_input_is_not_changed() -> None:
    layer, x = make_layer([3, 0, 5]), torch.randn(4, D_MODEL)
    before = x.clone()
    ragged_moe(x, *route(4, 3, 2), layer)
    assert x.equal(before)


def packed(rows: int, bits: int) -> PackedRows:
    codes = torch.randint(0, 2**bits, (rows, 64))
    scales, zeros = torch.rand(rows, 2).half() / 2**bits, torch.randn(rows, 2).half() / 4
    return PackedRows(bits, pack(codes, bits), scales, zeros)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_rows_stand_for_code_times_scale_plus_zero(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64))
    scales, zeros = torch.rand(3, 2).half(), torch.randn(3, 2).half()
    rows = PackedRows(bits, pack(codes, bits), scales, zeros)
    found = rows.dequantize(slice(1, 3), torch.float32)
    for row in (1, 2):
        for column in range(64):
            group = column // 32
            wanted = codes[row, column] * scales[row, group].float() + zeros[row, group].float()
            assert found[row - 1, column] == wanted


@pytest.mark.parametrize(
    "counts",
    [[(3, 4, 2), (0, 1, 0), (5, 0, 1)], [(0, 0, 0), (0, 0, 9), (0, 0, 0)], [(0, 0, 0)] * 3],
    ids=["mixed", "one expert, one tier", "nothing is left"],
)
def test_tiers_of_any_bits_add_up(counts: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(5)
    tiers, dense = [], []
    for tier, bits in enumerate((16, 3, 1)):
        widths = [expert[tier] for expert in counts]
        offsets = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
        rows = [
            torch.randn(sum(widths), 64) / 8 if bits == 16 else packed(sum(widths), bits)
            for _ in range(3)
        ]
        tiers.append(RaggedTier(*rows, offsets=offsets))
        plain = [dense_rows(matrix, slice(None), torch.float32) for matrix in rows]
        dense.append(RaggedLayer((RaggedTier(*plain, offsets=offsets),)))
    x, (weights, ids) = torch.randn(7, 64), route(7, 3, 2)
    wanted = sum(by_definition(x, weights, ids, layer) for layer in dense)
    out = ragged_moe(x, weights, ids, RaggedLayer(tuple(tiers)))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
