"""The one table of README.md: bytes, quality and speed of each setting, from the stored results.

    python -m bench.summary

Writes it there. Quality is of the reference MoE, speed of Qwen3-30B-A3B's shape.
"""

import statistics
import sys

from bench.quality import pruning, steps
from bench.reference import MODEL, ROOT
from bench.speed.kernel_report import KernelReport, Place
from bench.stored import README, put_in_page, stored
from camera_serve.benchmark.report import BenchReport
from camera_serve.benchmark.settings import Load
from camera_serve.checkpoint.reader import Checkpoint

TEXT = "code, in domain"
KERNELS = ROOT / "bench" / "results" / "kernels-cpu.json"
SERVED = ROOT / "bench" / "results" / "serve-qwen3-30b-a3b-4-layers.json"
SHAPE, TOKENS, CONCURRENCIES = "qwen3-30b-a3b", (1, 512), (1, 16)

SETTINGS = ("--prune 0.2", "--prune 0.4", "--prune 0.6", "--bits-per-weight 2.25")
REMOVED = ("20% removed", "40% removed", "60% removed")
TARGETS = dict(zip(SETTINGS, (*REMOVED, "2.25 bits"), strict=True))
CONTESTANTS = dict(zip(SETTINGS, ("λ = 20%", "λ = 40%", "λ = 60%", "2.25 bits"), strict=True))
SERVED_MODELS = {"--prune 0.4": "b-pruned40", "--bits-per-weight 2.25": "b-bits2"}


def render() -> str:
    """The table, one line per setting; × is the speed over the fastest dense one."""
    kernels = KernelReport.read(KERNELS)
    served = BenchReport.model_validate_json(SERVED.read_text())
    columns = [
        *("setting", "expert weights", "perplexity"),
        *(f"MoE layer, {_counted(tokens, 'token')}" for tokens in TOKENS),
        *(f"`vllm serve`, {_counted(count, 'request')}" for count in CONCURRENCIES),
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for setting in SETTINGS:
        left, change = _quality(setting)
        layer = [f"{_layer_gain(kernels, setting, tokens):.2f}×" for tokens in TOKENS]
        whole = [_served_gain(served, setting, count) for count in CONCURRENCIES]
        cells = [f"`{setting}`", f"{left:.0%}", f"{change:+.1%}", *layer, *whole]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(kernels, served)])


def _quality(setting: str) -> tuple[float, float]:
    """Share of expert bytes that is left, and the relative change of perplexity."""
    rows = stored(steps.RESULTS, steps.RESULT_VERSION)["rows"]
    wanted = {"target": TARGETS[setting], "variant": steps.WHOLE, "samples": steps.SAMPLES}
    row = next(row for row in rows if wanted.items() <= row.items() and row["judged"] is None)
    found = stored(pruning.RESULTS, pruning.RESULT_VERSION)["rows"]
    dense = next(r for r in found if r["method"] == "dense" and r["text"] == TEXT)
    change = row["judgement"][TEXT]["perplexity"] / dense["perplexity"] - 1
    return row["bytes"] / Checkpoint.open(MODEL).expert_bytes, change


def _layer_gain(report: KernelReport, setting: str, tokens: int) -> float:
    place = Place(shape=SHAPE, routing="even", threads=1, tokens=tokens)
    name = CONTESTANTS[setting]
    return report.ratio(next(cell for cell in report.at(place) if cell.contestant == name))


def _served_gain(report: BenchReport, setting: str, concurrency: int) -> str:
    if setting not in SERVED_MODELS:
        return "–"
    load = Load(concurrency=concurrency)
    dense, ours = (
        statistics.median(run.output_tokens_per_second for run in report.runs(model, load))
        for model in (report.models[0].name, SERVED_MODELS[setting])
    )
    return f"{ours / dense:.2f}×"


def _caption(kernels: KernelReport, served: BenchReport) -> str:
    settings = served.settings
    return (
        "Perplexity on held-out code of the small MoE in `bench/reference_moe`; speed of layers of "
        f"Qwen3-30B-A3B's shape, one thread of an {kernels.environment.cpu} CPU with AVX-512 BF16, "
        "over the fastest stock kernel there; `vllm serve` with 4 such layers, "
        f"{settings.input_len} tokens in, {settings.output_len} out, output tokens/s. "
        "2.25 bits were timed as 3, 2 and 1 bits of the same bytes. The GPU kernels are untimed."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count > 1)


def main() -> int:
    """Put the table in README.md."""
    put_in_page(README, "summary", render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
