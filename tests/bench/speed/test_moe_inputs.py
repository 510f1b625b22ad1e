from itertools import islice

import torch

from bench.shapes.published import SHAPES, layer_energies
from bench.speed.contestants import Contestant
from bench.speed.moe_inputs import inputs_of, work

SHAPE = SHAPES["qwen3-30b-a3b"]
PER_CYCLE = SHAPE.num_experts // SHAPE.top_k


def test_even_routing_meets_every_expert_once_per_token_in_a_cycle_of_inputs() -> None:
    cycle = list(islice(inputs_of(SHAPE, 3, "even", seed=0), PER_CYCLE))
    ids = torch.stack([ids for _, _, ids in cycle])
    for token in range(3):
        assert sorted(ids[:, token].flatten().tolist()) == list(range(SHAPE.num_experts))
    # Tokens of one input choose for themselves.
    assert not torch.equal(ids[0, 0], ids[0, 1])


def test_skewed_routing_follows_the_load_that_goes_with_the_energies() -> None:
    (_, _, ids) = next(inputs_of(SHAPE, 4096, "skewed", seed=1))
    load = layer_energies(SHAPE, 1).tokens.double()
    seen = torch.bincount(ids.flatten(), minlength=SHAPE.num_experts).double()
    assert torch.corrcoef(torch.stack([seen, load]))[0, 1] > 0.95
    assert all(len(set(token)) == SHAPE.top_k for token in ids.tolist())


def test_inputs_are_what_the_kernels_take_and_come_again_by_their_seed() -> None:
    first, again = (next(inputs_of(SHAPE, 5, "even", seed=2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    x, weights, ids = first
    assert (x.dtype, weights.dtype, ids.dtype) == (torch.bfloat16, torch.float32, torch.int32)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


def test_an_expert_is_read_once_and_works_for_each_of_its_tokens() -> None:
    sizes = torch.tensor([1000, 300, 0, 20]), torch.tensor([10, 3, 0, 2])
    rival = Contestant("some", "camera", lambda x, weights, ids: x, *sizes)
    ids = torch.tensor([[0, 1], [1, 2], [1, 0]])
    read, flop = work(rival, torch.zeros(3, 64), torch.ones(3, 2), ids)
    assert read == 1300
    # Expert 0 has two tokens, expert 1 three: 29 micro-experts of three rows of 64 weights.
    assert flop == 2 * 3 * 64 * 29
