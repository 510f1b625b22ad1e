import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.shapes.published import SHAPES
from bench.speed import kernel_report, kernels
from bench.speed.contestants import Contestant
from bench.speed.kernel_report import Cell, KernelReport, Place, PlaceLimits
from bench.speed.kernels import time_in_turn
from bench.speed.limits import Limits
from camera_serve.benchmark.environment import Environment

TINY = SHAPES["qwen3-30b-a3b"].model_copy(
    update={"num_experts": 8, "top_k": 2, "d_ff": 128, "d_model": 256}
)


def cell(contestant: str, kind: str, milliseconds: float, tokens: int = 1) -> Cell:
    return Cell.model_validate(
        {
            "place": {"shape": "s", "routing": "even", "threads": 1, "tokens": tokens},
            "contestant": contestant,
            "kind": kind,
            "repetitions": 5,
            "median_seconds": milliseconds / 1e3,
            "quartiles_seconds": (1.0, 2.0),
            "read_bytes": 30e6,
            "flop": 60e6,
        }
    )


def limits(flop: float | None) -> tuple[PlaceLimits, ...]:
    return tuple(
        PlaceLimits.model_validate(
            {
                "place": {"shape": "s", "routing": "even", "threads": 1, "tokens": tokens},
                "limits": Limits(threads=1, read_bytes_per_second=read, bf16_flop_per_second=flop),
            }
        )
        for tokens, read in ((1, 20e9), (8, 24e9))
    )


def report(*cells: Cell, experts: int = 8) -> KernelReport:
    environment = Environment(
        cpu="CPU",
        cores=2,
        gpus=(),
        python="3.11",
        packages={"torch": "2", "zentorch": "3"},
        variables={},
        commit="abc",
    )
    return KernelReport.model_validate(
        {
            "environment": environment,
            "isa": "avx2",
            "settings": {
                "shapes": ("s",),
                "tokens": (1, 8),
                "plans": ("16:1",),
                "threads": (1,),
                "routings": ("even",),
                "seconds": 1,
                "memory_limit": 2_000_000_000,
            },
            "limits": limits(None),
            "checks": (),
            "layers": [{"shape": "s", "num_experts": experts, "published_experts": 8}],
            "cells": cells,
        }
    )


RIVALS = (
    cell("vLLM's own", "dense", 4),
    cell("zentorch", "dense", 3),
    cell("zentorch int8", "quantized", 2),
    cell("λ = 40%", "camera", 1.5),
    cell("vLLM's own", "dense", 10, tokens=8),
    cell("zentorch", "dense", 20, tokens=8),
    cell("λ = 40%", "camera", 8, tokens=8),
)


def test_ratios_are_over_the_faster_dense_kernel_of_the_same_cell() -> None:
    found = report(*RIVALS)
    ratios = [found.ratio(one) for one in found.cells]
    assert ratios == pytest.approx([0.75, 1, 1.5, 2, 1, 0.5, 1.25])


def test_the_table_has_a_line_per_number_of_tokens() -> None:
    lines = kernel_report.markdown(report(*RIVALS)).splitlines()
    assert lines[0].endswith("| fastest dense | zentorch int8 | λ = 40% |")
    assert lines[2] == "| s | even | 1 | 1 | zentorch | 1.50× | 2.00× |"
    assert lines[3] == "| s | even | 1 | 8 | vLLM's own |  | 1.25× |"
    assert "CPU (avx2): with 1 thread reads 22 GB/s. torch 2, zentorch 3, commit abc." in lines[5]


def test_dropped_experts_and_a_missing_baseline_are_said() -> None:
    alone = report(RIVALS[0], experts=6)
    fewer, missing = kernel_report.notes(alone)
    assert fewer == "s with 6 of 8 experts, as many as fit 2.0 GB"
    assert missing.startswith("zentorch is not installed")
    assert fewer in kernel_report.markdown(alone)
    assert list(kernel_report.notes(report(*RIVALS))) == []


def test_console_table_sets_rates_beside_the_machine_s_limits() -> None:
    (table,) = kernel_report.console_tables(report(*RIVALS))
    assert str(table.title) == "s, even routing, 1 thread; the machine reads 22 GB/s"
    columns = [list(column.cells) for column in table.columns]
    ours = [column[3] for column in columns]
    assert ours == ["1", "λ = 40%", "1.50", "2.00", "20.0", "40.0"]


def test_the_unpruned_layer_is_set_beside_the_machine_s_limits() -> None:
    ours = (cell("λ = 0%", "camera", 2), cell("λ = 0%", "camera", 5, tokens=8), *RIVALS)
    found = report(*ours).model_copy(update={"limits": limits(24e9)})
    (note,) = kernel_report.near_limits(found)
    # 30 MB in 2 ms, 60 MFLOP in 5 ms.
    assert note == (
        "λ = 0% on s (even routing, 1 thread) reaches 75% of the machine's reading rate at 1 token "
        "and 50% of its bf16 rate at 8 tokens"
    )
    assert note in kernel_report.markdown(found)
    assert list(kernel_report.near_limits(report(*RIVALS))) == []


def test_contestants_take_turns_on_the_same_input_which_then_changes() -> None:
    calls: list[tuple[str, int]] = []

    def rival(name: str) -> Contestant:
        def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            calls.append((name, int(ids)))
            return x

        return Contestant(name, "dense", run, torch.ones(1), torch.ones(1))

    inputs = [(torch.zeros(1), torch.zeros(1), torch.tensor(i)) for i in range(3)]
    measured: list[int] = []
    ruler: Any = SimpleNamespace(measure=lambda: measured.append(len(calls)))
    times = time_in_turn([rival("a"), rival("b")], inputs, 0, ruler)
    assert {name: len(found) for name, found in times.items()} == {"a": 5, "b": 5}
    # The first round warms up and is not timed.
    rounds = [2, 0, 1, 2, 0, 1]
    assert calls == [(name, i) for i in rounds for name in ("a", "b")]
    assert measured == [4, 6, 8, 10, 12]


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> int:
    monkeypatch.setitem(kernels.SHAPES, "tiny", TINY)
    command = ["kernels", "--output", str(tmp_path / "out" / "kernels.json"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    # Whatever goes wrong, no test writes in the repository.
    monkeypatch.setattr(kernels, "PAGE", tmp_path / "speed.md")
    return kernels.main()


def test_a_run_times_every_kernel_in_every_cell_and_stores_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = ("16:0.5,0:0.5", "3:0.2,2:0.6,1:0.2")
    arguments = ("--shape", "tiny", "--tokens", "1,3", "--routing", "even", "skewed")
    assert run(monkeypatch, tmp_path, *arguments, "--seconds", "0", "--plans", *plans) == 0
    found = KernelReport.read(tmp_path / "out" / "kernels.json")
    places = {
        Place(shape="tiny", routing=routing, threads=1, tokens=tokens)
        for routing in ("even", "skewed")
        for tokens in (1, 3)
    }
    names = ["vLLM's own", "λ = 50%", "2.25 bits"]
    assert {c.place for c in found.cells} == places
    for place in places:
        timed = [c.contestant for c in found.at(place)]
        assert [name for name in timed if not name.startswith("zentorch")] == names
    errors = {c.contestant: (c.error, c.vllm_error) for c in found.checks}
    # One rounding to bf16 at the end alone is 2^-9 / sqrt(3) of a value's power of two.
    assert all(5e-4 < error < 5e-3 for name in names for error in errors[name])
    # Dense kernels need the weights in bf16: a rounding that packed rows are spared.
    ours, theirs = errors["2.25 bits"]
    assert ours < 0.95 * theirs
    assert "λ = 50%" in capsys.readouterr().out

    page = tmp_path / "speed.md"
    page.write_text("a\n<!-- kernels:start -->\n<!-- kernels:end -->\nb\n")
    assert run(monkeypatch, tmp_path, "--docs", "--tokens", "3", "--routing", "even") == 0
    rows = re.findall(r"^\| tiny .*$", page.read_text(), flags=re.MULTILINE)
    assert len(rows) == 1 and rows[0].startswith("| tiny | even | 1 | 3 | ")


def killed(*given: Any) -> None:
    os._exit(9)


def test_a_process_that_is_killed_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "time_shape", killed)
    monkeypatch.setattr(kernels, "check", lambda *given: [])
    assert run(monkeypatch, tmp_path, "--shape", "tiny", "--memory-limit", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: tiny: the process") and "below 1.0" in error


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_kernel_that_is_wrong_is_not_timed(
    wrong: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def off(*given: Any) -> Contestant:
        right = camera(*given)
        return replace(right, run=lambda *inputs: right.run(*inputs) * wrong)

    camera = kernels.camera
    monkeypatch.setattr(kernels, "camera", off)
    for plan in ("16:0.5,0:0.5", "2:1"):
        assert run(monkeypatch, tmp_path, "--shape", "tiny", "--plans", plan) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: the CPU kernel is off by ") and f"plan {plan}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--plans", "16:0.9"], "fractions must sum to 1", 2),
        (["--plans", "2:1", "3:0.2,2:0.6,1:0.2"], "--plans has several of 2.25 bits", 2),
        (["--threads", "1,4096"], "--threads 4096: this process may use", 1),
        (["--memory-limit", "0", "--plans", "16:1"], "raise --memory-limit to 0.0", 1),
        (["--docs"], "kernels.json is missing: run `python -m bench.speed.kernels` first", 1),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path, "--shape", "tiny", *arguments) == code
    (error,) = [e for e in capsys.readouterr().err.splitlines() if not e.startswith("kernels:")]
    assert error.startswith("error: ") and message in error


def test_a_report_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "kernels.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**report(*RIVALS).model_dump(mode="json"), "version": 1}))
    assert run(monkeypatch, tmp_path, "--docs") == 1
    assert "version: Input should be 3; measure again" in capsys.readouterr().err
