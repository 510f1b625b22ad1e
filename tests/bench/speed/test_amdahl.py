from pathlib import Path

import pytest

from bench.speed import amdahl
from bench.speed.amdahl import gains
from bench.speed.kernel_report import Cell, KernelReport
from camera_serve.benchmark.environment import Environment
from camera_serve.benchmark.report import BenchReport
from camera_serve.errors import CameraError

HERE = Environment(cpu="CPU", cores=2, gpus=(), python="3", packages={}, variables={}, commit="abc")
PRUNED, GONE = "16:0.6,0:0.4", "16:0.01,0:0.99"


def cell(contestant: str, kind: str, tokens: int, seconds: float) -> Cell:
    place = {"shape": "qwen3-30b-a3b", "routing": "even", "threads": 2, "tokens": tokens}
    return Cell.model_validate(
        {
            "place": place,
            "contestant": contestant,
            "kind": kind,
            "repetitions": 5,
            "median_seconds": seconds,
            "quartiles_seconds": (seconds, seconds),
            "read_bytes": 1.0,
            "flop": 1.0,
        }
    )


def kernels(*cells: Cell) -> KernelReport:
    settings = {
        "shapes": ("qwen3-30b-a3b",),
        "tokens": (1,),
        "plans": (PRUNED,),
        "threads": (2,),
        "routings": ("even",),
        "seconds": 1,
        "memory_limit": 1,
    }
    return KernelReport.model_validate(
        {
            "environment": HERE,
            "isa": "avx2",
            "settings": settings,
            "limits": (),
            "checks": (),
            "layers": (),
            "cells": cells,
        }
    )


def served(*rates: tuple[str, str | None, float]) -> BenchReport:
    times = {"mean": 1.0, "median": 1.0, "p99": 1.0}
    runs = [
        {
            "model": name,
            "repeat": 0,
            "load": {"concurrency": 2},
            "requests": 4,
            "seconds": 1.0,
            "output_tokens_per_second": rate,
            "total_tokens_per_second": rate,
            "ttft_ms": times,
            "tpot_ms": times,
        }
        for name, _, rate in rates
    ]
    settings = {"concurrencies": (2,), "input_len": 10, "output_len": 5, "threads": 2}
    models = [{"name": name, "plan": plan, "weight_bytes": 1} for name, plan, _ in rates]
    return BenchReport.model_validate(
        {"settings": settings, "environment": HERE, "models": models, "serving": runs}
    )


MODELS = (("dense", None, 10.0), ("pruned", PRUNED, 16.0), ("rest", GONE, 50.0))
CELLS = (
    cell("zentorch", "dense", 1, 0.5),
    cell("zentorch", "dense", 3, 1.5),
    cell("zentorch", "dense", 20, 6),
    cell("slow", "dense", 1, 9),
    cell("λ = 40%", "camera", 1, 0.25),
    cell("λ = 40%", "camera", 3, 0.75),
    cell("λ = 40%", "camera", 20, 2),
)


def test_amdahl_s_law_over_prompts_and_single_tokens() -> None:
    (gain,) = gains(served(*MODELS), kernels(*CELLS))
    # 0.1 s per token, 0.02 of it not MoE; a wave takes 6 + 4 * 1 s of MoE against 2 + 4 * 0.5.
    assert gain.model == "pruned"
    assert gain.moe_share == pytest.approx(0.8)
    assert gain.layer == pytest.approx(2.5)
    assert gain.allowed == pytest.approx(1 / (0.2 + 0.8 / 2.5))
    assert gain.measured == pytest.approx(1.6)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CameraError, match=r"no model has 98% .* pruned: serve one more"):
        list(gains(served(*MODELS[:2]), kernels(*CELLS)))
    with pytest.raises(CameraError, match="no times of λ = 40% on this layer with 2 threads"):
        list(gains(served(*MODELS), kernels(*CELLS[:4])))
    with pytest.raises(CameraError, match="20 tokens are outside of what was timed, 1 to 3"):
        list(gains(served(*MODELS), kernels(*CELLS[:2], *CELLS[4:])))
    everywhere = served(*MODELS)
    settings = everywhere.settings.model_copy(update={"threads": None})
    with pytest.raises(CameraError, match="served on all cores: serve them with --threads N"):
        list(gains(everywhere.model_copy(update={"settings": settings}), kernels(*CELLS)))


def test_the_table_sets_measured_beside_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served(*MODELS).write(tmp_path / "served.json")
    layers = tmp_path / "kernels.json"
    layers.write_text(kernels(*CELLS).model_dump_json())
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "served.json"), "--kernels", str(layers)])
    assert amdahl.main() == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "pruned" in line)
    assert [part.strip() for part in row.strip("│").split("│")] == [
        *("2", "pruned", "80%", "2.50×", "1.92×", "1.60×", "83%")
    ]
    (tmp_path / "served.json").unlink()
    assert amdahl.main() == 1
    assert "served.json is missing: run `camera-serve bench` first" in capsys.readouterr().err
    (tmp_path / "served.json").write_text("{}")
    assert amdahl.main() == 1
    assert "is no result of `camera-serve bench`" in capsys.readouterr().err
