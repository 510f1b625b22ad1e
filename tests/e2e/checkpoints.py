"""Tiny checkpoints that vLLM's own dense model of every family answers as transformers does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import editing, pruning, quantized, tiny_models
from tests.e2e.engine import NUM_TOKENS, PROMPTS, Answer, Prompts

# Float32 on both sides, so only the order of sums differs: 2e-4 was the largest difference seen.
# A single lost micro-expert moves these models' log-probabilities by far more.
TOLERANCE = 5e-4

NOT_ON_CPU = {
    # vLLM's CPU router scores ungrouped experts by softmax alone.
    "laguna": "AssertionError",
    "minimax_m2": "AssertionError",
    "deepseek_v32": "NotImplementedError: Sparse Attention is not supported on CPU",
}
"""Families of which vLLM runs no model on a CPU, not even the original, and what it then raises."""

SERVED = tuple(family for family in tiny_models.FAMILIES if family not in NOT_ON_CPU)

# As published. With plain rotary tables vLLM's CPU kernel rotates MLA queries of 2 heads wrongly,
# in the dense model just the same.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
}
# vLLM's CPU backend has linear attention in bfloat16 only: `HYBRIDS` are served in that as well.
_FULL_ATTENTION = {"layer_types": ["full_attention", "full_attention"]}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_parameters": _YARN},
    "deepseek_v3": {"rope_parameters": _YARN},
    "qwen3_next": _FULL_ATTENTION,
    "qwen3_5_moe": _FULL_ATTENTION,
    "qwen3_5_moe_text": _FULL_ATTENTION,
}

_TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
# With prefix caching vLLM takes it for granted that such a model has linear attention somewhere.
_NO_PREFIXES = {"enable_prefix_caching": False}
HYBRID: dict[str, Any] = {"dtype": "bfloat16", "enable_prefix_caching": True}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "qwen3_next": _NO_PREFIXES,
    "qwen3_5_moe": _NO_PREFIXES | _TEXT_ONLY,
    "qwen3_5_moe_text": _NO_PREFIXES,
    "qwen3_vl_moe": _TEXT_ONLY,
    "kimi_k25": {"limit_mm_per_prompt": {"vision_chunk": 0}},
}
"""Arguments of `vllm.LLM` that a family's tiny model wants, and one with linear attention."""


def make(
    family: str, folder: Path, widths: pruning.Widths = pruning.hostile
) -> tuple[Path, torch.nn.Module]:
    """A compressed checkpoint, and transformers' original model with the same rows zeroed."""
    original = dense(family, folder)
    kept = pruning.prune(original, folder / "pruned", widths)
    return folder / "pruned", pruning.zeroed(original, kept)


def make_quantized(family: str, folder: Path, plan: str) -> tuple[Path, torch.nn.Module]:
    """A quantized checkpoint, and transformers' original model with the weights it stands for."""
    original = dense(family, folder)
    quantized.compress(original, folder / "quantized", plan)
    return folder / "quantized", quantized.dequantized(original, folder / "quantized")


@dataclass(frozen=True)
class Hybrid:
    """A pruned checkpoint with linear attention, and transformers' models to compare it with."""

    path: Path
    zeroed: torch.nn.Module
    original: torch.nn.Module

    def check(self, answers: list[Answer]) -> None:
        """Served in bfloat16, it answers as the original with zeroed rows, not as the original."""
        found, other = (_rounding(model, answers) for model in (self.zeroed, self.original))
        assert found < 0.15
        assert other > 1


def make_hybrid(family: str, folder: Path) -> Hybrid:
    """A family's tiny model as it is, its attention linear in some layers."""
    path = tiny_models.save(family, folder / "dense")
    kept = pruning.prune(path, folder / "pruned")
    original = tiny_models.load(path, dtype=torch.float32)
    return Hybrid(folder / "pruned", pruning.zeroed(path, kept), original)


def dense(family: str, folder: Path) -> Path:
    """The original of both."""
    path = tiny_models.save(family, folder / "dense", **_OVERRIDES.get(family, {}))
    if family == "phimoe":
        # vLLM leaves the bias of Phi's head out, in the dense model just the same.
        editing.edit_weights(path, lambda tensors: tensors["lm_head.bias"].zero_())
    if family in ("ernie4_5_moe", "laguna"):
        # vLLM's CPU router leaves out a bias of softmax scores, and its loader that of Laguna, in
        # the dense model just the same.
        editing.edit_weights(path, _zero_router_biases)
    return path


def _zero_router_biases(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()


@torch.no_grad()
def expected(model: torch.nn.Module, prompts: Prompts = PROMPTS) -> list[torch.Tensor]:
    """transformers' greedy answers: log-probabilities `[NUM_TOKENS, vocab]` for each prompt."""
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            rows = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            tokens.append(int(rows[-1].argmax()))
        answers.append(rows[-NUM_TOKENS:])
    return answers


def difference(answers: list[Answer], wanted: list[torch.Tensor]) -> float:
    """Largest difference of the top-5 log-probabilities; the tokens must be the same."""
    worst = 0.0
    for answer, rows in zip(answers, wanted, strict=True):
        assert answer.tokens == rows.argmax(-1).tolist()
        for top, row in zip(answer.top, rows, strict=True):
            found = torch.tensor(sorted(top.values(), reverse=True))
            assert len(found) >= 5
            same_rank = (found - row.topk(len(top)).values).abs().max().item()
            same_token = max(abs(value - row[int(token)].item()) for token, value in top.items())
            worst = max(worst, same_rank, same_token)
    return worst


@torch.no_grad()
def _rounding(model: torch.nn.Module, answers: list[Answer]) -> float:
    """Mean difference of the top-5 log-probabilities to transformers', both after `answers`.

    In bfloat16 another token may be chosen where two are almost as likely.
    """
    differences = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.tokens[:-1]]])
        rows = model(tokens).logits[0].float().log_softmax(-1)[-NUM_TOKENS:]
        for top, row in zip(answer.top, rows, strict=True):
            differences += [abs(value - row[int(token)].item()) for token, value in top.items()]
    return sum(differences) / len(differences)
