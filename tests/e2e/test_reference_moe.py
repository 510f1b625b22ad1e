"""The bundled reference MoE, compressed by the command line's own path, behind `vllm serve`."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import torch
from openai import OpenAI
from openai.types.chat.chat_completion import Choice
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera_serve.hf  # noqa: F401  (from_pretrained then knows compressed checkpoints)
from bench.reference import CALIBRATION, HELDOUT, MODEL
from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.benchmark.server import served

pytestmark = pytest.mark.e2e

# float32, because in bfloat16 a batch of 32 and a batch of 1 round near-ties differently.
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "32", "--dtype", "float32", "--enforce-eager")
TOOL_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
PROMPT = "def read_json(path):\n"
QUESTION = "How do I open a file?"
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 12},
        "line": {"type": "integer", "minimum": 1, "maximum": 99},
        "mode": {"enum": ["read", "write"]},
    },
    "required": ["path", "line", "mode"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}}
    for name in ("open_file", "close_file")
]
NAMED: Any = {"type": "function", "function": {"name": "close_file"}}


@dataclass(frozen=True)
class Server:
    client: OpenAI
    model: str
    blanks: tuple[str, ...]
    """Ids of the tokens that are white space alone."""

    def complete(self, prompt: str, max_tokens: int = 24) -> str:
        reply = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0
        )
        return reply.choices[0].text

    def answer(self, **arguments: Any) -> Choice:
        """The answer to the question, without blanks that a grammar would let go on for ever."""
        reply = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=128,
            temperature=0,
            logit_bias={token: -100 for token in self.blanks},
            **arguments,
        )
        return reply.choices[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    output = tmp_path_factory.mktemp("reference") / "compressed"
    calibration = Calibration(source=str(CALIBRATION), samples=8, seq_len=512)
    compress(MODEL, output, Recipe.paper(plan=TierPlan.prune(0.4), calibration=calibration))
    with (
        served(output, *FLAGS, *TOOL_FLAGS) as serving,
        OpenAI(base_url=serving.url, api_key="none") as client,
    ):
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        ids = range(len(tokenizer))
        yield Server(
            client, str(output), tuple(str(i) for i in ids if tokenizer.decode(i).isspace())
        )


def test_a_completion_continues_python(server: Server) -> None:
    text = server.complete(PROMPT)
    assert text.startswith((" ", "\n", "\t"))
    assert len(text.strip()) > 10


def test_a_chat_is_answered(server: Server) -> None:
    reply = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=16,
        temperature=0,
    )
    assert reply.choices[0].message.content
    assert reply.usage is not None and reply.usage.completion_tokens == 16


def test_a_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    chunks = server.client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True
    )
    parts = [chunk.choices[0].text for chunk in chunks]
    assert len(parts) > 5
    assert "".join(parts) == server.complete(PROMPT)


@torch.no_grad()
def test_log_probabilities_are_those_of_transformers(server: Server) -> None:
    reply = server.client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs
    found = sorted(logprobs.top_logprobs[0].values(), reverse=True)
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(server.model)(PROMPT, return_tensors="pt").input_ids
    wanted = model(tokens).logits[0, -1].log_softmax(-1).topk(5).values
    # float32 on both sides: only the order of sums differs.
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=5e-4)


def test_32_requests_at_once_answer_as_one_by_one(server: Server) -> None:
    lines = HELDOUT["code, in domain"].read_text().splitlines()
    prompts = [line for line in lines if 20 < len(line) < 80][:320:10]
    assert len(prompts) == 32
    alone = [server.complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(server.complete, prompts))
    assert together == alone


def test_an_answer_follows_a_json_schema(server: Server) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    answer = server.answer(response_format=wanted)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)


def test_an_answer_matches_a_regular_expression(server: Server) -> None:
    pattern = r"[a-z]{3,8}\.py: \d\d"
    answer = server.answer(extra_body={"structured_outputs": {"regex": pattern}})
    assert answer.finish_reason == "stop"
    assert re.fullmatch(pattern, answer.message.content or "")


def test_an_answer_is_one_of_the_choices(server: Server) -> None:
    choices = ["a zebra", "a yak"]
    answer = server.answer(extra_body={"structured_outputs": {"choice": choices}})
    assert answer.finish_reason == "stop"
    assert answer.message.content in choices


@pytest.mark.parametrize(
    ("choice", "names"),
    [(NAMED, {"close_file"}), ("required", {"open_file", "close_file"})],
    ids=["named", "required"],
)
def test_a_tool_is_called_with_arguments_of_its_schema(
    server: Server, choice: Any, names: set[str]
) -> None:
    answer = server.answer(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    # By OpenAI's rules a named call ends with "stop", one the model chose with "tool_calls".
    assert answer.finish_reason == ("stop" if choice == NAMED else "tool_calls")
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.function.name in names
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
