"""Train the reference MoE: tokenizer, model, log and Hugging Face folder, on a CPU.

    python -m bench.reference_moe.train --text train.txt --work WORK --minutes 94

The learning rate follows the elapsed wall time, so a run ends when it should on a busy machine.
A run that was stopped goes on from the checkpoint in ``--work``.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from bench.reference_moe.architecture import new_model, train_tokenizer
from bench.reference_moe.corpus import SEPARATOR

HERE = Path(__file__).parent
HELDOUT_WINDOW = 2048


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return the tokens of all documents, each closed by the end token, as uint16."""
    rows = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*row.ids, end], dtype=np.uint16) for row in rows])


def windows(text: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> Tensor:
    """Return up to ``limit`` windows of a text's tokens: [n, HELDOUT_WINDOW]."""
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    count = min(limit, len(ids) // HELDOUT_WINDOW)
    return ids[: count * HELDOUT_WINDOW].view(count, HELDOUT_WINDOW)


def window_loss(model: nn.Module, row: Tensor) -> float:
    """Return the mean next-token loss over one window [L]."""
    with torch.no_grad():
        return model(input_ids=row[None], labels=row[None]).loss.item()


def mean_loss(model: nn.Module, rows: Tensor, pool: ThreadPoolExecutor) -> float:
    """Return the mean next-token loss over windows [n, L]."""
    losses = list(pool.map(lambda row: window_loss(model, row), rows))
    return sum(losses) / len(losses)


@dataclass
class Schedule:
    """Learning rate and sequence length as functions of the share of the wall time used."""

    peak: float
    seconds: float
    short: int
    long: int
    warmup: float = 0.02
    decay_from: float = 0.5
    long_from: float = 0.7

    def rate(self, share: float) -> float:
        """Warm up linearly, hold, then fall linearly to 2% of the peak."""
        if share < self.warmup:
            return self.peak * max(share / self.warmup, 0.01)
        fall = max(0.0, min(1.0, (share - self.decay_from) / (1 - self.decay_from)))
        return self.peak * (1 - 0.98 * fall)

    def length(self, share: float) -> int:
        """Short sequences first, long ones at the end."""
        return self.long if share >= self.long_from else self.short


@dataclass
class Progress:
    """What a checkpoint carries beside the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Masters:
    """Float32 weights and AdamW state behind a bf16 model."""

    def __init__(self, model: nn.Module, rate: float, decay: float) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        """Add one micro-batch's gradients to the sums."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            assert master.grad is not None
            master.grad.add_(gradient)

    def step(self, rate: float) -> None:
        """Update the masters, then the model's bf16 weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def state(self) -> dict:
        """Return what a checkpoint needs."""
        masters = [m.detach() for m in self.masters]
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Take up a checkpoint's state."""
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()


def draw(stream: Tensor, length: int, tokens: int, step: int) -> Tensor:
    """Draw one step's sequences [tokens / length, length] from the token stream [N]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - length, (tokens // length,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()]).long()


def save_checkpoint(path: Path, state: dict, progress: Progress) -> None:
    """Write the state beside its place, then rename it."""
    partial = path.with_suffix(".partial")
    torch.save(state | {"progress": vars(progress)}, partial)
    partial.replace(path)


def export(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder: bf16, one tensor set per expert, a portable tokenizer."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text("utf-8"))
    for loader_detail in ("backend", "is_local", "local_files_only"):
        values.pop(loader_detail, None)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def log_line(path: Path, **values: float) -> None:
    """Append one JSON line."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")


def prepare_tokens(text: Path, work: Path) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Return the tokenizer and the token stream [N], from the cache in ``work`` if there."""
    folder, cache = work / "tokenizer", work / "tokens.npy"
    if not cache.exists():
        documents = text.read_text(encoding="utf-8").split(SEPARATOR)
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(folder)
        np.save(cache, encode(tokenizer, documents))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, torch.from_numpy(np.load(cache).astype(np.int32))


class Run:
    """One training run: its state, its log and its checkpoint.

    Each thread takes whole micro-batches with single-threaded operations, so that a core that is
    also wanted by other programs slows down only its own share.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        options.work.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.tokenizer, self.stream = prepare_tokens(options.text, options.work)
        self.model = new_model(self.tokenizer)
        self.masters = Masters(self.model, options.rate, 0.1)
        self.schedule = Schedule(
            options.rate, options.minutes * 60, options.length, options.long_length
        )
        self.progress = Progress()
        self.pool = ThreadPoolExecutor(options.threads)
        self.lock = Lock()
        self.checkpoint = options.work / "checkpoint.pt"
        self.heldout = {
            name: windows((HERE / f"heldout_{name}.txt").read_text("utf-8"), self.tokenizer, 4)
            for name in ("code", "prose")
        }
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.progress = Progress(**state["progress"])
            self.masters.load(state)

    def batch(self, length: int) -> int:
        """Return the tokens of a step: at least a sequence for every thread."""
        return max(self.options.batch, self.options.threads * length)

    def micro_batch(self, rows: Tensor) -> float:
        """Add the gradients of rows [n, L] to the sums; return the next-token loss alone."""
        output = self.model(input_ids=rows, labels=rows, output_router_logits=True)
        share = rows.numel() / self.batch(rows.shape[1])
        gradients = torch.autograd.grad(output.loss * share, self.masters.weights)
        with self.lock:
            self.masters.add(gradients)
        return output.loss.item() - self.model.router_aux_loss_coef * output.aux_loss.item()

    def step(self) -> float:
        """Take one step at the rate and length of this moment; return its loss."""
        share = self.progress.seconds / self.schedule.seconds
        length = self.schedule.length(share)
        rows = draw(self.stream, length, self.batch(length), self.progress.step)
        micro = rows.split(max(1, self.options.micro // length))
        losses = list(self.pool.map(self.micro_batch, micro))
        self.masters.step(self.schedule.rate(share))
        self.progress.step += 1
        self.progress.tokens += rows.numel()
        return sum(losses) / len(losses)

    def report(self, losses: list[float]) -> None:
        """Log the losses, write the checkpoint and a loadable snapshot."""
        heldout = {
            f"heldout_{name}": mean_loss(self.model, rows, self.pool)
            for name, rows in self.heldout.items()
        }
        rate = self.schedule.rate(self.progress.seconds / self.schedule.seconds)
        loss = sum(losses) / len(losses)
        log_line(self.options.log, **vars(self.progress), loss=loss, rate=rate, **heldout)
        save_checkpoint(self.checkpoint, self.masters.state(), self.progress)
        export(self.model, self.tokenizer, self.options.work / "snapshot")

    def train(self) -> None:
        """Train until the wall time is used, reporting every few minutes."""
        losses: list[float] = []
        reported = self.progress.seconds
        begin = time.monotonic() - self.progress.seconds
        while self.progress.seconds < self.schedule.seconds:
            losses.append(self.step())
            self.progress.seconds = time.monotonic() - begin
            if self.progress.seconds - reported > self.options.report_minutes * 60:
                self.report(losses)
                losses, reported = [], self.progress.seconds
        self.report(losses)
        export(self.model, self.tokenizer, self.options.out)


def main() -> None:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="train.txt of corpus.py")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint and token cache")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--log", type=Path, default=HERE / "training_log.jsonl")
    parser.add_argument("--minutes", type=float, default=94)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=2048, help="tokens per step")
    parser.add_argument("--micro", type=int, default=1024, help="tokens per micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--long-length", type=int, default=2048)
    parser.add_argument("--report-minutes", type=float, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Run(options).train()


if __name__ == "__main__":
    main()
