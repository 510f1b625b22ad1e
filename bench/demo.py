"""The main job for real: compress the reference MoE, serve it beside the original, compare.

python -m bench.demo [--model FOLDER] [--prune 0.4]
"""

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import reference
from camera_serve.benchmark.process import termination_as_exit
from camera_serve.benchmark.server import served
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CameraError
from camera_serve.evaluation.perplexity import likelihood, load_model, windows_of

COMPLETIONS = (
    'def read_json(path):\n    """Return the parsed content of a JSON file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
CHAT = "How do I open a file?"
ANSWER_TOKENS = 48
SHARE_TOLERANCE = 0.02


class DemoError(RuntimeError):
    """A step of the demo failed, or its result is not what the demo promises."""


@dataclass(frozen=True)
class Outcome:
    """What one model weighs and says: one perplexity per text, one answer per prompt."""

    expert_bytes: int
    perplexities: tuple[float, ...]
    answers: tuple[str, ...]


def main() -> int:
    """Run the demo; ends with one line `demo: OK` or `demo: FAILED: reason`, and an exit code."""
    options = _parse_options()
    try:
        with termination_as_exit(), tempfile.TemporaryDirectory(prefix="camera-demo-") as folder:
            run(options.model, Path(folder) / "compressed", options.prune)
    except (DemoError, CameraError, OpenAIError, OSError) as error:
        print(f"demo: FAILED: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit):
        print("demo: FAILED: interrupted")
        return 130
    print("demo: OK")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.demo")
    parser.add_argument("--model", type=Path, default=reference.MODEL)
    parser.add_argument("--prune", type=float, default=0.4)
    return parser.parse_args()


def run(model: Path, output: Path, prune: float) -> None:
    """Compress `model` to `output`, serve both, print the comparison; raises `DemoError`."""
    if not (model / "config.json").is_file():
        raise DemoError(f"no model at {model}")
    compress(model, output, prune)
    dense, compressed = observe("dense", model), observe("compressed", output)
    Console(width=110).print(comparison(dense, compressed, prune))
    check(dense, compressed, prune)


def compress(model: Path, output: Path, prune: float) -> None:
    """Run `camera-serve compress` as a user does."""
    command = [str(Path(sys.executable).parent / "camera-serve"), "compress", str(model)]
    command += ["-o", str(output), "--prune", str(prune)]
    command += ["--calibration", str(reference.CALIBRATION)]
    _say("compress", " ".join(command))
    if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise DemoError(f"camera-serve compress ended with code {code}")


def observe(name: str, model: Path) -> Outcome:
    """Measure one model: bytes on disk, perplexity in transformers, answers of `vllm serve`."""
    _say(name, "perplexity on the held-out texts")
    loaded = load_model(model)
    perplexities = tuple(
        math.exp(likelihood(loaded, windows_of(model, text)).mean)
        for text in reference.HELDOUT.values()
    )
    _say(name, f"vllm serve {model}")
    with served(model) as server:
        answers = ask(server.url)
    return Outcome(Checkpoint.open(model).expert_bytes, perplexities, answers)


def ask(base_url: str) -> tuple[str, ...]:
    """Greedy answers to the completions, then to the chat question."""
    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    answers = [
        client.completions.create(
            model=model, prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0
        )
        .choices[0]
        .text
        for prompt in COMPLETIONS
    ]
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": CHAT}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
    )
    return (*answers, chat.choices[0].message.content or "")


def comparison(dense: Outcome, compressed: Outcome, prune: float) -> Table:
    """The two outcomes side by side."""
    table = Table(title="Reference MoE behind vllm serve", show_lines=True)
    table.add_column("")
    table.add_column("dense")
    table.add_column(f"compressed, {prune:.0%} of micro-experts removed")
    sizes = [f"{o.expert_bytes / 2**20:.2f} MiB" for o in (dense, compressed)]
    table.add_row("expert weights on disk", *sizes)
    for name, *found in zip(
        reference.HELDOUT, dense.perplexities, compressed.perplexities, strict=True
    ):
        table.add_row(f"perplexity ({name})", *(f"{perplexity:.2f}" for perplexity in found))
    prompts = (*COMPLETIONS, f"chat: {CHAT}")
    for texts in zip(prompts, dense.answers, compressed.answers, strict=True):
        table.add_row(*(escape(text.strip()) for text in texts))
    return table


def check(dense: Outcome, compressed: Outcome, prune: float) -> None:
    """Refuse a result that is not smaller by `prune`, or a model that says nothing."""
    removed = 1 - compressed.expert_bytes / dense.expert_bytes
    if abs(removed - prune) > SHARE_TOLERANCE:
        raise DemoError(f"expert weights shrank by {removed:.1%}, wanted {prune:.0%}")
    for name, outcome in (("dense", dense), ("compressed", compressed)):
        if not all(outcome.answers):
            raise DemoError(f"the {name} model gave an empty answer: {outcome.answers}")


def _say(name: str, what: str) -> None:
    print(f"demo: {name}: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
