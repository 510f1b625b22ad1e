from pathlib import Path
from typing import Any

import pytest

from bench import reference
from bench.quality import pruning
from camera_serve.recipe import Calibration, Recipe, TierPlan
from tests import tiny_models


def row(method: str, fraction: float, perplexity: float, **more: Any) -> dict[str, Any]:
    errors = {"log_ratio_to_dense": 0.01, "log_ratio_to_dense_se": 0.002}
    return {
        "method": method,
        "fraction": fraction,
        "text": "code",
        "perplexity": perplexity,
        **errors,
        **more,
    }


RESULT = {
    "version": 1,
    "model": "m",
    "window": 2048,
    "weight_norm": "norm",
    "tokens": {"code": 1000},
    "environment": {"cpu": "c", "torch": "1", "transformers": "5", "commit": "abc"},
    "rows": [
        row("dense", 0.0, 20.0),
        row("camera-p", 0.2, 20.5),
        row("weight-norm", 0.2, 21.0),
        *(row("random", 0.2, 22.0 + seed, seed=seed) for seed in range(3)),
    ],
}


def test_table_shows_every_method_and_the_range_over_seeds() -> None:
    lines = pruning.render(RESULT).splitlines()
    assert lines[2] == "| code | 0% (dense) | 20.00 | 20.00 | 20.00 |"
    assert lines[3] == (
        "| code | 20% | 20.50 (+1.0% ± 0.2%) | 21.00 (+1.0% ± 0.2%) | 23.00 (22.00 to 24.00) |"
    )


def test_every_method_removes_the_same_share_and_is_compared_in_pairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_models.save("qwen2_moe", tmp_path / "model")
    text = reference.ROOT / "tests" / "tiny_models.py"
    monkeypatch.setattr(reference, "HELDOUT", {"code": text})
    (tmp_path / "text.txt").write_text(text.read_text())
    calibration = Calibration(source=str(tmp_path / "text.txt"), samples=4, seq_len=64)
    recipe = Recipe.paper(plan=TierPlan.prune(0.4), calibration=calibration)
    result = pruning.measure(model, [recipe])
    assert str(tmp_path) not in str(result)
    rows = {(row["method"], row.get("seed")): row for row in result["rows"]}
    assert set(rows) == {
        ("dense", None),
        ("camera-p", None),
        ("weight-norm", None),
        *(("random", seed) for seed in pruning.SEEDS),
    }
    assert rows["camera-p", None]["expert_bytes_removed"] == pytest.approx(0.4, abs=0.05)
    camera, norm = rows["camera-p", None], rows["weight-norm", None]
    difference = norm["log_ratio_to_dense"] - camera["log_ratio_to_dense"]
    assert norm["log_ratio_to_camera_p"] == pytest.approx(difference)
    assert len({row["perplexity"] for row in rows.values()}) == len(rows)
