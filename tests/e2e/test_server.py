"""`vllm serve` itself, with no flag that names the plugin, asked by the `openai` client."""

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from camera_serve.benchmark.process import VllmError
from camera_serve.benchmark.server import Server, served
from tests import editing
from tests.e2e import checkpoints
from tests.e2e.engine import NUM_TOKENS, PROMPTS, Answer

pytestmark = pytest.mark.e2e

FLAGS = ("--max-model-len", "128", "--max-num-seqs", "8", "--dtype", "float32")
DRAFTS = {"num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SPECULATION = ("--speculative-config", json.dumps({"method": "ngram", **DRAFTS}))
# The tiny model goes on repeating this one, so that guesses from the text are right.
REPETITION = [77] * 12
ASKED = (*PROMPTS, REPETITION)
MISSING = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "flags"),
    [("qwen2_moe", ()), ("deepseek", ("--enforce-eager", *SPECULATION))],
    ids=["compiled", "eager, speculating"],
)
def test_answers_over_http_equal_the_original_with_the_same_rows_zeroed(
    family: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    path, model = checkpoints.make(family, tmp_path)
    with (
        served(path, *FLAGS, *flags) as server,
        OpenAI(base_url=server.url, api_key="none") as client,
        ThreadPoolExecutor(len(ASKED)) as pool,
    ):
        answers = list(pool.map(lambda prompt: _ask(client, str(path), prompt), ASKED))
        accepted = _accepted_drafts(server)
    wanted = checkpoints.expected(model, ASKED)
    assert checkpoints.difference(answers, wanted) < checkpoints.TOLERANCE
    assert (accepted > 0) == (flags[1:] == SPECULATION)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (
            lambda path: editing.edit_weights(path, lambda tensors: tensors.pop(MISSING)),
            f"tensor {MISSING} [64, 64] is missing",
        ),
        (
            lambda path: editing.edit_config(path, lambda c: c.pop("quantization_config")),
            "has lost its quantization_config",
        ),
    ],
    ids=["tensor", "quantization_config"],
)
def test_a_tampered_checkpoint_stops_the_server_and_is_named_last(
    tamper: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path, _ = checkpoints.make("qwen2_moe", tmp_path)
    tamper(path)
    with pytest.raises(VllmError) as caught, served(path, *FLAGS, "--enforce-eager"):
        pass
    assert message in str(caught.value).splitlines()[-1]


def _ask(client: OpenAI, model: str, prompt: list[int]) -> Answer:
    reply = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=5,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    tokens = [int(_id(token)) for token in logprobs.tokens or []]
    top = [{_id(t): p for t, p in each.items()} for each in logprobs.top_logprobs or []]
    return Answer(tokens, top)


def _accepted_drafts(server: Server) -> float:
    """How many tokens were guessed from the text before them, and right."""
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics") as reply:
        lines = reply.read().decode().splitlines()
    counter = "vllm:spec_decode_num_accepted_tokens_total{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(counter))


def _id(token: str) -> str:
    return token.removeprefix("token_id:")
