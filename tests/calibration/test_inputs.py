"""What experts are given, and what of it is held back from every fit."""

import torch
from torch import nn

from camera_serve.calibration.inputs import InputRecorder, inputs_of_shared


def _recorded(num_tokens: int = 16, top_k: int = 2, num_experts: int = 4):
    generator = torch.Generator().manual_seed(0)
    recorder = InputRecorder()
    x = torch.randn(num_tokens, 3, generator=generator)
    ids = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
    )
    weights = torch.rand(num_tokens, top_k, generator=generator)
    for part in (slice(0, 5), slice(5, None)):
        recorder(nn.Identity(), (x[part], ids[part], weights[part]))
    return x, ids, weights, recorder.routed(num_experts)


def test_every_expert_has_its_tokens_and_their_weights() -> None:
    x, ids, weights, inputs = _recorded()
    for expert in range(4):
        batches = list(inputs.batches(expert, 3, torch.device("cpu")))
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        assert torch.cat([b for b, _ in batches]).equal(x[rows])
        assert torch.cat([w for _, w in batches]).equal(weights[rows, slots])


def test_the_last_eighth_of_the_tokens_is_held_back() -> None:
    _, _, _, inputs = _recorded()
    fitting, held = inputs.split()
    for expert in range(4):
        both = torch.cat([fitting.tokens[expert], held.tokens[expert]])
        assert both.equal(inputs.tokens[expert])
        assert torch.cat([fitting.weights[expert], held.weights[expert]]).equal(
            inputs.weights[expert]
        )
        assert (fitting.tokens[expert] < 14).all()
        assert (held.tokens[expert] >= 14).all()


def test_a_shared_expert_is_given_every_token_weighted_by_its_gate() -> None:
    x, _, _, inputs = _recorded()
    gate = torch.tensor([[1.0, -2.0, 0.5]])
    ((given, weights),) = inputs_of_shared(inputs, gate).batches(0, 99, torch.device("cpu"))
    assert given.equal(x)
    torch.testing.assert_close(weights, 1 / (1 + torch.exp(-(x @ gate[0]))))
    ((_, alone),) = inputs_of_shared(inputs, None).batches(0, 99, torch.device("cpu"))
    assert alone.equal(torch.ones(16))
