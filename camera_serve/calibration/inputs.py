"""What the experts of a layer are given: the tokens routed to each, or all of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutedInputs:
    """What the routed tokens of a MoE layer were.

    x: `[num_tokens, d_model]`; tokens[e]: int64 indices of the tokens routed to expert e.
    """

    x: torch.Tensor
    tokens: tuple[torch.Tensor, ...]

    def batches(
        self, expert: int, tokens_at_once: int, device: torch.device
    ) -> Iterator[torch.Tensor]:
        """One expert's inputs, float32, some tokens at a time: a shared expert sees all of them."""
        for tokens in self.tokens[expert].split(tokens_at_once):
            yield self.x[tokens].to(device, torch.float32)


class InputRecorder:
    """A forward pre-hook of an experts module that keeps its inputs and routes, on the CPU."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []

    def __call__(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keep `hidden_states` and `top_k_index` of one batch."""
        self._x.append(arguments[0].cpu())
        self._ids.append(arguments[1].cpu())

    def routed(self, num_experts: int) -> RoutedInputs:
        """All batches together, by expert; the recorder gives them up."""
        ids = torch.cat(self._ids)
        order = torch.sort(ids.flatten(), stable=True).indices // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
        self._ids.clear()
        return RoutedInputs(self._inputs(len(ids)), order.split(counts))

    def _inputs(self, num_tokens: int) -> torch.Tensor:
        """All inputs, each batch given up once it is copied: they are never held twice."""
        x, done = self._x[0].new_empty((num_tokens, self._x[0].shape[1])), 0
        while self._x:
            batch = self._x.pop(0)
            x[done : done + len(batch)] = batch
            done += len(batch)
        return x


def every_token(inputs: RoutedInputs) -> RoutedInputs:
    """The inputs of a shared expert: all tokens, in order."""
    return RoutedInputs(inputs.x, (torch.arange(len(inputs.x)),))
