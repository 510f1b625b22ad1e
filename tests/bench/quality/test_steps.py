import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import reference
from bench.quality import steps
from camera_serve.recipe import Calibration, TierPlan
from tests import tiny_models

PLAN = {"plan": TierPlan.prune(0.4), "align": 8}
CASES = [
    steps.Case("40% removed", variant, settings | PLAN, samples=1, judged=1)
    for variant, settings in ((steps.PAPERS, steps.PAPER), (steps.WHOLE, {}))
]


def test_a_case_is_measured_once_and_told_by_all_that_decides_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_models.save("qwen2_moe", tmp_path / "model")
    text = reference.ROOT / "tests" / "tiny_models.py"
    (tmp_path / "text.txt").write_text(text.read_text())
    monkeypatch.setattr(reference, "HELDOUT", {"code": text})
    monkeypatch.setattr(steps, "Calibration", lambda **s: Calibration(**s, seq_len=64))
    texts, output = {"code": tmp_path / "text.txt"}, tmp_path / "result.json"
    steps.measure(model, CASES[:1], texts, output, at_once=2)
    before = json.loads(output.read_text())["rows"]
    steps.measure(model, CASES, texts, output, at_once=2)
    rows = json.loads(output.read_text())["rows"]
    assert rows[:1] == before and [row["variant"] for row in rows] == [c.variant for c in CASES]
    assert rows[0]["bytes"] == pytest.approx(rows[1]["bytes"], rel=0.02)
    assert all(len(row["judgement"]["code"]["per_window"]) == 1 for row in rows)
    assert rows[1]["judgement"]["code"]["divergence"] > 0
    assert str(tmp_path) not in output.read_text()


def result() -> dict[str, Any]:
    """All cases at a divergence of 0.04 nats, and what takes all steps at 0.01."""
    rows = []
    for case in [*steps.main_cases(), *steps.ablations(), *steps.other_texts()]:
        nats = 0.01 if case.variant == steps.WHOLE else 0.04
        found = {"perplexity": 2.0, "divergence": nats, "per_window": [nats * 100, nats * 300]}
        rows.append(case.key | {"bytes": 50, "seconds": 3.0, "judgement": {"code": found}})
    return {
        "version": steps.RESULT_VERSION,
        "tokens_per_window": {"code": [100, 300]},
        "environment": {"cpu": "c", "torch": "1", "transformers": "5", "commit": "abc"},
        "rows": rows,
    }


def test_tables_show_the_factor_and_what_it_rests_on() -> None:
    lines = steps.render(result()).splitlines()
    assert "| 40% removed | 100.0% | 0.0400 → 0.0100 (0.25×; -0.0300 ± 0.0000) |" in lines
    assert "| 2.25 bits, all steps | 0.25 (0.25 to 0.25) | 1.00× |" in lines
    assert "| 2.25 bits, refit alone | 1.00 (1.00 to 1.00) | 1.00× |" in lines
    assert "| 2k tokens of code | 2.25 bits | 0.0400 → 0.0100 (0.25×; -0.0300 ± 0.0000) |" in lines


def test_a_case_that_is_missing_is_named() -> None:
    found = result()
    found["rows"] = found["rows"][1:]
    with pytest.raises(SystemExit, match="20% removed"):
        steps.render(found)


def test_every_step_is_tried_alone_and_taken_out() -> None:
    cases = [case for case in steps.ablations() if case.target == "2.25 bits" and not case.seed]
    by_variant = {case.variant: case.recipe(Path("text")) for case in cases}
    whole, paper = by_variant[steps.WHOLE], by_variant[steps.PAPERS]
    for step in steps.OF_QUANTIZING:
        for field, value in steps.STEPS[step].items():
            alone, without = by_variant[f"{step} alone"], by_variant[f"without {step}"]
            assert getattr(alone, field) == value == getattr(whole, field)
            assert getattr(without, field) == steps.PAPER[field] == getattr(paper, field)
    assert replace(cases[0], seed=1).key != cases[0].key
