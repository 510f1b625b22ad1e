"""What `compress` gives at the same bytes as the published algorithm, and what each step is worth.

    python -m bench.quality.steps
    python -m bench.quality.steps --docs

On the reference MoE, on held-out code and prose. The first measures what `bench/results/` does not
have yet and adds it there, so that it may be interrupted; the second only puts the stored tables in
docs/quality.md. Divergence, not perplexity, decides: it cannot fall by losing what the dense model
had learned wrongly.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import reference
from bench.stored import DOCS, environment, put_in_page, stored
from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.evaluation.perplexity import (
    WINDOW,
    Cost,
    Score,
    costs,
    load_model,
    windows_of,
)
from camera_serve.recipe import PAPER

RESULTS = reference.ROOT / "bench" / "results" / "steps-reference-moe.json"
RESULT_VERSION = 1

SAMPLES, FEWER, DRAWS = 128, 32, 3
"""Calibration windows of the main figures, and of each of the draws of the ablations."""

JUDGED = 16
"""Held-out windows of each text that the ablations are judged on; the main figures have all."""

PRUNED = {f"{share:.0%} removed": TierPlan.prune(share) for share in (0.2, 0.4, 0.6)}
QUANTIZED = {
    "1.5 bits": (1.5, TierPlan.parse("2:0.25,1:0.75")),
    "2.25 bits": (2.25, TierPlan.mixed(2, 0.2)),
    "3.25 bits": (3.25, TierPlan.mixed(3, 0.2)),
}
"""Bits per weight, scales and zeros counted, and CAMERA-Q's plan of as many."""

PAPERS, WHOLE = "published", "all steps"
STEPS: dict[str, dict[str, Any]] = {
    "one budget": {"budget": "model"},
    "elimination": {"elimination": True},
    "weighted": {"weighted": True},
    "refit": {"refit": True},
    "polish": {"polish": True},
}
OF_PRUNING = ("one budget", "elimination", "refit")
OF_QUANTIZING = ("one budget", "weighted", "refit", "polish")
LESS_TEXT = (1, 4, 16, 128)
"""Calibration windows: 2k, 8k, 32k and 262k tokens."""


@dataclass(frozen=True)
class Case:
    """One compression that is judged: what it aims at, which steps it takes, and its text.

    settings: of the recipe; judged: held-out windows of each text, None for all.
    """

    target: str
    variant: str
    settings: Mapping[str, Any] = field(hash=False, compare=False)
    samples: int = SAMPLES
    seed: int = 0
    text: str = "code"
    judged: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What it is told by in the results."""
        return {
            "target": self.target,
            "variant": self.variant,
            "samples": self.samples,
            "seed": self.seed,
            "text": self.text,
            "judged": self.judged,
        }

    def recipe(self, source: Path) -> Recipe:
        """Its recipe, calibrated on a text."""
        calibration = Calibration(source=str(source), samples=self.samples, seed=self.seed)
        return Recipe(calibration=calibration, **self.settings)


def main() -> None:
    """Measure what is missing, and store it; or put the tables in the docs."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.steps")
    parser.add_argument("--only", choices=("main", "ablations", "texts"), help="some of the cases")
    parser.add_argument("--prose", type=Path, help="calibration text of prose, for `texts`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=6, help="models that are judged together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only put the stored tables there")
    options = parser.parse_args()
    if options.docs:
        put_in_page(DOCS / "quality.md", "steps", render(stored(options.output, RESULT_VERSION)))
        return
    torch.set_num_threads(options.threads)
    texts = {"code": reference.CALIBRATION, "prose": options.prose}
    parts = {"main": main_cases, "ablations": ablations, "texts": other_texts}
    wanted = [
        case
        for name, cases in parts.items()
        if options.only in (None, name)
        for case in cases()
        if texts[case.text] is not None
    ]
    measure(reference.MODEL, wanted, texts, options.output, options.at_once)


def main_cases() -> Iterator[Case]:
    """The published algorithm and all steps, over sizes."""
    for target, plan in PRUNED.items():
        yield from _pair(target, {"plan": plan}, {"plan": plan})
    narrow = {"plan": PRUNED["40% removed"], "align": 1}
    yield from _pair("40% removed, align 1", narrow, narrow)
    for target, (bits, plan) in QUANTIZED.items():
        # align 1: on experts of 128 micro-experts, multiples of 32 would blur the tiers.
        yield from _pair(target, {"plan": plan, "align": 1}, {"bits_per_weight": bits, "align": 1})


def _pair(target: str, published: dict[str, Any], whole: dict[str, Any]) -> Iterator[Case]:
    yield Case(target, PAPERS, PAPER | published)
    yield Case(target, WHOLE, whole)


def ablations() -> Iterator[Case]:
    """Each step alone and taken out of the whole, over draws of the calibration text."""
    plan = {"plan": PRUNED["40% removed"]}
    bits, shares = QUANTIZED["2.25 bits"]
    cases = [
        Case("40% removed", variant, steps | plan) for variant, steps in _combinations(OF_PRUNING)
    ]
    cases.append(Case("40% removed", "all steps, 2 sweeps", plan | {"sweeps": 2}))
    for variant, steps in _combinations(OF_QUANTIZING):
        over_model = steps.get("budget", "model") == "model"
        goal = {"bits_per_weight": bits} if over_model else {"plan": shares}
        cases.append(Case("2.25 bits", variant, steps | goal | {"align": 1}))
    for seed in range(DRAWS):
        for case in cases:
            yield replace(case, samples=FEWER, seed=seed, judged=JUDGED)


def _combinations(steps: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield PAPERS, PAPER
    for step in steps:
        yield f"{step} alone", PAPER | STEPS[step]
    for step in steps:
        yield f"without {step}", {key: PAPER[key] for key in STEPS[step]}
    yield WHOLE, {}


def other_texts() -> Iterator[Case]:
    """The published algorithm and all steps, with less calibration text and with another."""
    targets = ("40% removed", "2.25 bits")
    cases = [replace(c, judged=JUDGED) for c in main_cases() if c.target in targets]
    for samples in LESS_TEXT:
        yield from (replace(case, samples=samples) for case in cases)
    yield from (replace(case, samples=FEWER, text="prose") for case in cases)


def measure(
    model: Path, cases: list[Case], texts: Mapping[str, Path], output: Path, at_once: int
) -> None:
    """Compress and judge each case that `output` lacks, some models at a time."""
    windows = {name: windows_of(model, text) for name, text in reference.HELDOUT.items()}
    result = stored(output, RESULT_VERSION) if output.exists() else _empty(windows)
    done = [{key: row[key] for key in cases[0].key} for row in result["rows"]]
    missing = [case for case in cases if case.key not in done]
    dense = load_model(model)
    for judged in sorted({case.judged for case in missing}, key=lambda count: count or 0):
        some = {name: found[:judged] for name, found in windows.items()}
        same = [case for case in missing if case.judged == judged]
        for start in range(0, len(same), at_once):
            result["rows"] += _measured(model, same[start : start + at_once], texts, dense, some)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")


def _empty(windows: Mapping[str, list[torch.Tensor]]) -> dict[str, Any]:
    tokens = {name: [w.shape[1] - 1 for w in found] for name, found in windows.items()}
    return {
        "version": RESULT_VERSION,
        "environment": environment(),
        "tokens_per_window": tokens,
        "rows": [],
    }


def _measured(
    model: Path,
    cases: list[Case],
    texts: Mapping[str, Path],
    dense: Any,
    windows: Mapping[str, list[torch.Tensor]],
) -> list[dict[str, Any]]:
    rows, models = [], []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="camera-steps-") as folder:
            start = time.process_time()
            report = compress(model, Path(folder) / "out", case.recipe(texts[case.text]))
            seconds = time.process_time() - start
            models.append(load_model(Path(folder) / "out"))
        print(f"{case.key}: {report.expert_bytes_after} bytes, {seconds:.0f} s", flush=True)
        refused = sum(len(layer.unfitted_experts) for layer in report.layers)
        bytes_after = report.expert_bytes_after
        rows.append(case.key | {"bytes": bytes_after, "seconds": seconds, "refused": refused})
    for name, found in windows.items():
        for row, cost in zip(rows, costs(models, dense, found), strict=True):
            row.setdefault("judgement", {})[name] = _figures(cost)
    return rows


def _figures(cost: Cost) -> dict[str, Any]:
    return {
        "perplexity": math.exp(cost.likelihood.mean),
        "divergence": cost.divergence.mean,
        "per_window": [round(nats, 4) for nats in cost.divergence.total.tolist()],
    }


def render(result: dict[str, Any]) -> str:
    """The stored figures as Markdown tables: all sizes, the steps, and other calibration texts."""
    texts = list(result["tokens_per_window"])
    tables = [[*make(result, texts)] for make in (_main_table, _steps_table, _texts_table)]
    # One without a case that is measured has a header alone.
    parts = ["\n".join(table) for table in tables if len(table) > 2]
    return "\n\n".join([*parts, _caption(result, texts)])


def _main_table(result: dict[str, Any], texts: list[str]) -> Iterator[str]:
    columns = ["size", "bytes", *(f"{text}: published → now" for text in texts)]
    yield from _header(columns)
    for case in main_cases():
        if case.variant == WHOLE:
            now = _row(result, case)
            before = _row(result, replace(case, variant=PAPERS))
            cells = [_change(result, before, now, text) for text in texts]
            yield _line([case.target, f"{now['bytes'] / before['bytes']:.1%}", *cells])


def _steps_table(result: dict[str, Any], texts: list[str]) -> Iterator[str]:
    yield from _header(["steps", *(f"{text}: × published" for text in texts), "time"])
    cases = [case for case in ablations() if case.seed == 0]
    for case in cases:
        draws = [replace(case, seed=seed) for seed in range(DRAWS)]
        draws = [draw for draw in draws if _stored(result, draw)]
        if not draws:
            continue
        now = [_row(result, draw) for draw in draws]
        before = [_row(result, replace(draw, variant=PAPERS)) for draw in draws]
        cells = [
            _range(
                [_divergence(n, t) / _divergence(b, t) for n, b in zip(now, before, strict=True)]
            )
            for t in texts
        ]
        times = [n["seconds"] / b["seconds"] for n, b in zip(now, before, strict=True)]
        yield _line([f"{case.target}, {case.variant}", *cells, f"{statistics.median(times):.2f}×"])


def _texts_table(result: dict[str, Any], texts: list[str]) -> Iterator[str]:
    yield from _header(["calibration", "size", *(f"{text}: published → now" for text in texts)])
    for case in other_texts():
        if case.variant != WHOLE or not _stored(result, case):
            continue
        before, now = _row(result, replace(case, variant=PAPERS)), _row(result, case)
        cells = [_change(result, before, now, text) for text in texts]
        tokens = case.samples * WINDOW // 1000
        yield _line([f"{tokens}k tokens of {case.text}", case.target, *cells])


def _header(columns: list[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|---" * len(columns) + "|"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _stored(result: dict[str, Any], case: Case) -> dict[str, Any] | None:
    return next((row for row in result["rows"] if case.key.items() <= row.items()), None)


def _row(result: dict[str, Any], case: Case) -> dict[str, Any]:
    found = _stored(result, case)
    if found is None:
        raise SystemExit(f"{RESULTS} lacks {case.key}: run python -m bench.quality.steps")
    return found


def _divergence(row: dict[str, Any], text: str) -> float:
    found: float = row["judgement"][text]["divergence"]
    return found


def _change(result: dict[str, Any], before: dict[str, Any], now: dict[str, Any], text: str) -> str:
    """`.0461 → .0149 (0.32×, -.0312 ± .0017)`: the difference with its paired standard error."""
    difference, error = _score(result, now, text).difference(_score(result, before, text))
    old, new = _divergence(before, text), _divergence(now, text)
    return f"{old:.4f} → {new:.4f} ({new / old:.2f}×; {difference:+.4f} ± {error:.4f})"


def _score(result: dict[str, Any], row: dict[str, Any], text: str) -> Score:
    total = torch.tensor(row["judgement"][text]["per_window"], dtype=torch.float64)
    tokens = torch.tensor(result["tokens_per_window"][text], dtype=torch.float64)
    return Score(total, tokens[: len(total)])


def _range(ratios: list[float]) -> str:
    return f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _caption(result: dict[str, Any], texts: list[str]) -> str:
    found = result["environment"]
    tokens = ", ".join(f"{sum(result['tokens_per_window'][t]):,} tokens of {t}" for t in texts)
    return (
        "KL divergence from the dense model, nats per token, of `bench/reference_moe/model` "
        f"({tokens}), with paired standard errors over windows of {WINDOW}. First table: "
        f"{SAMPLES} calibration windows. Steps: {FEWER} windows in up to {DRAWS} draws, judged on "
        f"{JUDGED} windows of each text, mean and range; time is the CPU time of `compress`. "
        f"{found['cpu']}, torch {found['torch']}, transformers {found['transformers']}, commit "
        f"{found['commit']}."
    )


if __name__ == "__main__":
    main()
