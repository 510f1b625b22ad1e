"""What the experts of a layer are given: the tokens routed to each, or all of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

HELD_BACK = 8
"""One token in so many, the last ones, is kept out of every fit, and judges it."""


@dataclass(frozen=True)
class RoutedInputs:
    """What the routed tokens of a MoE layer were.

    x: `[num_tokens, d_model]`; tokens[e]: int64 indices of the tokens routed to expert e, rising;
    weights[e]: their routing weights.
    """

    x: torch.Tensor
    tokens: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]

    def batches(
        self, expert: int, tokens_at_once: int, device: torch.device
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """One expert's inputs and routing weights, float32, some tokens at a time."""
        for x, weights in self.parts(expert, tokens_at_once, device):
            yield x.float(), weights.float()

    def parts(
        self, expert: int, tokens_at_once: int, device: torch.device
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """As `batches`, in the dtypes of the run.

        A shared expert sees all tokens, so they are not made at once.
        """
        pairs = zip(
            self.tokens[expert].split(tokens_at_once),
            self.weights[expert].split(tokens_at_once),
            strict=True,
        )
        for tokens, weights in pairs:
            yield self.x[tokens].to(device), weights.to(device)

    def of(self, expert: int) -> "RoutedInputs":
        """Those of one expert alone, which is number 0 of them."""
        return RoutedInputs(self.x, (self.tokens[expert],), (self.weights[expert],))

    def split(self) -> "tuple[RoutedInputs, RoutedInputs]":
        """The tokens to fit to, and those held back."""
        border = len(self.x) - len(self.x) // HELD_BACK
        counts = [int((tokens < border).sum()) for tokens in self.tokens]
        return (
            self._spans([slice(0, count) for count in counts]),
            self._spans([slice(count, None) for count in counts]),
        )

    def last(self, count: int) -> "RoutedInputs":
        """The last `count` tokens alone."""
        start = len(self.x) - count
        later = self._spans([slice(int((own < start).sum()), None) for own in self.tokens])
        return RoutedInputs(
            self.x[start:], tuple(own - start for own in later.tokens), later.weights
        )

    def _spans(self, spans: list[slice]) -> "RoutedInputs":
        tokens = tuple(t[span] for t, span in zip(self.tokens, spans, strict=True))
        weights = tuple(w[span] for w, span in zip(self.weights, spans, strict=True))
        return RoutedInputs(self.x, tokens, weights)


class InputRecorder:
    """A forward pre-hook of an experts module that keeps its inputs and routes, on the CPU."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def __call__(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keep `hidden_states`, `top_k_index` and `top_k_weights` of one batch."""
        for held, argument in zip((self._x, self._ids, self._weights), arguments, strict=True):
            held.append(argument.cpu())

    def routed(self, num_experts: int) -> RoutedInputs:
        """All batches together, by expert; the recorder gives them up."""
        ids, weights = torch.cat(self._ids), torch.cat(self._weights)
        order = torch.sort(ids.flatten(), stable=True).indices
        counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
        self._ids.clear()
        self._weights.clear()
        tokens = (order // ids.shape[1]).split(counts)
        return RoutedInputs(self._inputs(len(ids)), tokens, weights.flatten()[order].split(counts))

    def _inputs(self, num_tokens: int) -> torch.Tensor:
        """All inputs, each batch given up once it is copied: they are never held twice."""
        x, done = self._x[0].new_empty((num_tokens, self._x[0].shape[1])), 0
        while self._x:
            batch = self._x.pop(0)
            x[done : done + len(batch)] = batch
            done += len(batch)
        return x


def inputs_of_shared(inputs: RoutedInputs, gate: torch.Tensor | None) -> RoutedInputs:
    """What a shared expert is given: all tokens, weighted by the sigmoid of its gate.

    gate: `[1, d_model]`, None where the family adds the shared expert as it is.
    """
    if gate is None:
        return every_token(inputs)
    weights = torch.sigmoid(functional.linear(inputs.x.to(gate), gate)).squeeze(-1)
    return every_token(inputs, weights.cpu())


def every_token(inputs: RoutedInputs, weights: torch.Tensor | None = None) -> RoutedInputs:
    """The inputs of a shared expert: all tokens, in order.

    weights: what its own gate weights them by, `[num_tokens]`; None: it has none.
    """
    num_tokens = len(inputs.x)
    if weights is None:
        weights = torch.ones(num_tokens)
    return RoutedInputs(inputs.x, (torch.arange(num_tokens),), (weights,))
