"""How often a compressed copy guesses what its original says next, and that answers stay the same.

    python -m bench.quality.drafts
    python -m bench.quality.drafts --docs

`vllm serve` answers greedily with the reference MoE alone, and with each copy as its draft model.
The first measures and writes `bench/results/`; the second only puts the stored table in
docs/serving.md.
"""

import argparse
import json
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markdown import Markdown

from bench import reference
from bench.stored import DOCS, environment, put_in_page, stored
from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.benchmark.server import Server, served
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.evaluation.perplexity import windows_of

RESULTS = reference.ROOT / "bench" / "results" / "drafts-reference-moe.json"
RESULT_VERSION = 1
TEXT = "code, in domain"
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 20, 64, 64
SPECULATIVE_TOKENS = 3
FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager")
COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")


@dataclass(frozen=True)
class Answer:
    """A greedy answer: token ids, and the log-probabilities of the five likeliest at each place."""

    tokens: tuple[int, ...]
    top: tuple[Mapping[int, float], ...]


def main() -> int:
    """Measure and store, or render what is stored."""
    options = _parse_options()
    if not options.docs:
        calibration = Calibration(source=str(reference.CALIBRATION), samples=options.samples)
        recipes = {
            f"--prune {fraction}": Recipe.paper(
                plan=TierPlan.prune(fraction), calibration=calibration
            )
            for fraction in (0.2, 0.4, 0.6)
        }
        # align 1: on experts of 128 micro-experts, multiples of 32 would blur the tiers.
        recipes["--bits 2"] = Recipe.paper(
            plan=TierPlan.mixed(2, 0.2), calibration=calibration, align=1
        )
        result = measure(reference.MODEL, recipes)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = render(stored(options.output, RESULT_VERSION))
    Console().print(Markdown(table))
    if options.docs:
        put_in_page(DOCS / "serving.md", "drafts", table)
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.drafts")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only rewrite the table of docs/")
    return parser.parse_args()


def measure(model: Path, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Answers of `model` with a copy by each recipe as its draft, as JSON values."""
    prompts = prompts_of(model, reference.HELDOUT[TEXT])
    alone, _ = _answers(model, prompts)
    rows = []
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory(prefix="camera-drafts-") as folder:
            draft = Path(folder) / "draft"
            compress(model, draft, recipe)
            answers, counts = _answers(model, prompts, *_speculation(draft))
            before, after = Checkpoint.open(model), Checkpoint.open(draft)
        gaps = [gap(one, other) for one, other in zip(alone, answers, strict=True)]
        rows.append(
            {
                "draft": name,
                "expert_bytes_left": after.expert_bytes / before.expert_bytes,
                **counts,
                "equal_answers": gaps.count(None),
                "largest_gap": max((found for found in gaps if found is not None), default=0.0),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {
        "version": RESULT_VERSION,
        "environment": {**environment(), "vllm": version("vllm")},
        "text": TEXT,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "speculative_tokens": SPECULATIVE_TOKENS,
        "rows": rows,
    }


def prompts_of(model: Path, text: Path) -> list[list[int]]:
    """`PROMPTS` pieces of a text, `PROMPT_TOKENS` tokens each, from all over it."""
    tokens = torch.cat([window.flatten() for window in windows_of(model, text)])
    step = (len(tokens) - PROMPT_TOKENS) // PROMPTS
    starts = range(0, PROMPTS * step, step)
    return [tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]


def gap(wanted: Answer, found: Answer) -> float | None:
    """How much likelier, in nats, `wanted` took its token to be than the first one that differs.

    None for equal answers. Infinite for a token that it did not have among the likeliest.
    """
    for token, other, top in zip(wanted.tokens, found.tokens, wanted.top, strict=True):
        if token != other:
            return top[token] - top.get(other, -float("inf"))
    return None


def _speculation(draft: Path) -> tuple[str, str]:
    settings = {"method": "draft_model", "num_speculative_tokens": SPECULATIVE_TOKENS}
    return "--speculative-config", json.dumps({**settings, "model": str(draft)})


def _answers(
    model: Path, prompts: Sequence[list[int]], *flags: str
) -> tuple[list[Answer], dict[str, int]]:
    """The answers of a server, one after another, and what its counters of drafts say after."""
    with (
        served(model, *FLAGS, *flags) as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        answers = [_ask(client, str(model), prompt) for prompt in prompts]
        return answers, _counts(server)


def _ask(client: OpenAI, model: str, prompt: list[int]) -> Answer:
    reply = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        logprobs=5,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    found = reply.choices[0].logprobs
    assert found is not None and found.tokens and found.top_logprobs
    top = [{_id(name): value for name, value in each.items()} for each in found.top_logprobs]
    return Answer(tuple(map(_id, found.tokens)), tuple(top))


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _counts(server: Server) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as reply:
        families = text_string_to_metric_families(reply.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {
        name: int(sum(s.value for s in samples if s.name == f"vllm:spec_decode_num_{name}_total"))
        for name in COUNTERS
    }


def render(result: Mapping[str, Any]) -> str:
    """The stored figures as a Markdown table, one line per draft."""
    lines = [
        "| draft | expert weights | guesses accepted | tokens per step | answers unchanged |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        accepted = row["accepted_tokens"] / row["draft_tokens"]
        per_step = 1 + row["accepted_tokens"] / row["drafts"]
        equal = f"{row['equal_answers']} of {result['prompts']}"
        cells = [f"`{row['draft']}`", f"{row['expert_bytes_left']:.0%}", f"{accepted:.0%}"]
        lines.append("| " + " | ".join([*cells, f"{per_step:.2f}", equal]) + " |")
    return "\n".join([*lines, "", _caption(result)])


def _caption(result: Mapping[str, Any]) -> str:
    found = result["environment"]
    gaps = max(row["largest_gap"] for row in result["rows"])
    ties = (
        f" The others differ first where the original gives both tokens the same log-probability "
        f"to within {gaps:.2g}: bfloat16 rounds a batch of guesses otherwise than one token."
        if gaps
        else ""
    )
    return (
        f"`bench/reference_moe/model` behind `vllm serve` with a copy of it that guesses "
        f"{result['speculative_tokens']} tokens at a time; {result['prompts']} prompts of "
        f"{result['prompt_tokens']} tokens of {result['text']}, {result['answer_tokens']} tokens "
        f"of greedy answer to each, in bfloat16.{ties} {found['cpu']}, vLLM {found['vllm']}, "
        f"commit {found['commit']}."
    )


if __name__ == "__main__":
    sys.exit(main())
