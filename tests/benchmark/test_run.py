import json
import os
from pathlib import Path
from typing import Any

import pytest

from camera_serve.benchmark.process import VllmError
from camera_serve.benchmark.report import Drafts, Times
from camera_serve.benchmark.run import bench
from camera_serve.benchmark.settings import BenchSettings, Load
from camera_serve.errors import CheckpointError
from tests import pruning
from tests.benchmark import fake_vllm

SERVE_ONLY: dict[str, Any] = {"modes": ("serve",), "concurrencies": (2,), "repeats": 1}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return fake_vllm.install(monkeypatch, tmp_path)


def _value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def _without(arguments: list[str], *flags: str) -> list[str]:
    """Arguments without the model, and without some flags and their values."""
    gone = {arguments.index(flag) + i for flag in flags for i in (0, 1)}
    return [word for i, word in enumerate(arguments) if i not in gone]


def test_models_take_turns_and_then_in_the_opposite_order(command: Path, tmp_path: Path) -> None:
    models = [fake_vllm.model(tmp_path / name, speed=10) for name in "ABC"]
    settings = BenchSettings(concurrencies=(1, 16), request_rates=(2.5,))
    report = bench(models, settings)
    found = [(call["model"], call["mode"]) for call in fake_vllm.calls(command)]
    modes = ["serve", *["bench serve"] * 3, "bench throughput", "bench latency"]
    assert found == [(name, mode) for name in "ABCCBA" for mode in modes]
    assert [(run.model, run.repeat) for run in report.serving[::3]] == [
        *zip("ABC", [0] * 3, strict=True),
        *zip("CBA", [1] * 3, strict=True),
    ]


def test_every_model_gets_the_same_flags_and_the_user_s_come_last(
    command: Path, tmp_path: Path
) -> None:
    models = [fake_vllm.model(tmp_path / name, speed=10) for name in "AB"]
    flags = ("--enforce-eager", "--max-model-len", "512")
    settings = BenchSettings(threads=1, input_len=32, output_len=16, repeats=1, vllm_flags=flags)
    bench(models, settings)
    found = fake_vllm.calls(command)
    binding = {str(min(os.sched_getaffinity(0)))}
    assert {c["environment"]["VLLM_CPU_OMP_THREADS_BIND"] for c in found} == binding
    of = {(c["model"], c["mode"]): c["arguments"] for c in found}
    for mode in ("serve", "bench throughput", "bench latency"):
        ours = ["--max-model-len", "112", "--no-enable-prefix-caching"]
        assert of["A", mode][-6:] == [*ours, *flags]
    serve_a, serve_b = (_without(of[name, "serve"], "--port")[2:] for name in "AB")
    assert serve_a == serve_b
    asked_a, asked_b = (
        _without(of[name, "bench serve"], "--port", "--model", "--result-dir") for name in "AB"
    )
    assert asked_a == asked_b


def test_a_load_says_how_many_requests_come_when(command: Path, tmp_path: Path) -> None:
    model = fake_vllm.model(tmp_path / "A", speed=10)
    settings = BenchSettings(
        modes=("serve",), concurrencies=(1, 16), request_rates=(0.1, 2.5), repeats=1, seed=3
    )
    bench([model], settings)
    asked = [c["arguments"] for c in fake_vllm.calls(command) if c["mode"] == "bench serve"]
    assert [_value(a, "--num-prompts") for a in asked] == ["8", "64", "8", "75"]
    assert [_value(a, "--num-warmups") for a in asked] == ["3", "16", "3", "3"]
    assert [_value(a, "--max-concurrency") for a in asked[:2]] == ["1", "16"]
    assert [_value(a, "--request-rate") for a in asked[2:]] == ["0.1", "2.5"]
    assert all(_value(a, "--seed") == "3" and "--ignore-eos" in a for a in asked)
    assert not any("--max-concurrency" in a for a in asked[2:])


def test_figures_are_those_that_vllm_wrote(command: Path, tmp_path: Path) -> None:
    model = fake_vllm.model(tmp_path / "A", speed=20)
    report = bench([model], BenchSettings(concurrencies=(4,), output_len=30, repeats=1))
    (run,) = report.serving
    assert run.load == Load(concurrency=4)
    assert (run.output_tokens_per_second, run.total_tokens_per_second) == (80, 240)
    assert (run.requests, run.seconds) == (16, 2)
    assert run.ttft_ms == Times(mean=30, median=50, p99=90)
    assert run.tpot_ms == Times(mean=3, median=5, p99=9)
    (throughput,), (latency,), (memory,) = report.throughput, report.latency, report.memory
    # 20 / 10 requests a second of 30 tokens each.
    assert (throughput.output_tokens_per_second, throughput.requests) == (60, 16)
    assert (latency.mean_seconds, latency.median_seconds) == (3, 2.5)
    assert memory.model_bytes == round(1.5 * 2**30)
    # A bare interpreter takes megabytes, and this is its own memory, not the test's.
    assert memory.peak_resident_bytes and 4e6 < memory.peak_resident_bytes < 60e6
    assert report.models[0].weight_bytes == 1000


def test_what_became_of_drafts_is_told_where_a_server_speculates(
    command: Path, tmp_path: Path
) -> None:
    models = [
        fake_vllm.model(tmp_path / "A", speed=20),
        fake_vllm.model(tmp_path / "B", speed=30, accepted=18),
        fake_vllm.model(tmp_path / "C", speed=30, accepted=0),
    ]
    steps: list[str] = []
    report = bench(models, BenchSettings(**SERVE_ONLY), on_step=steps.append)
    drafts = [Drafts(tokens=30, accepted=accepted) for accepted in (18, 0)]
    assert [run.drafts for run in report.serving] == [None, *drafts]
    assert [step for step in steps if "bench serve" in step] == [
        "  vllm bench serve, 2 at once: 40.0 output tokens/s",
        "  vllm bench serve, 2 at once: 60.0 output tokens/s, 60% of drafts accepted",
        "  vllm bench serve, 2 at once: 60.0 output tokens/s, 0% of drafts accepted",
    ]


def test_the_environment_is_that_of_the_vllm_processes(command: Path, tmp_path: Path) -> None:
    model = fake_vllm.model(tmp_path / "A", speed=20)
    report = bench([model], BenchSettings(threads=1, **SERVE_ONLY))
    (call,) = (c for c in fake_vllm.calls(command) if c["mode"] == "serve")
    assert report.environment.variables.items() >= call["environment"].items()
    assert call["environment"].keys() == {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"}
    assert {"camera-serve", "torch", "vllm"} <= report.environment.packages.keys()


def test_models_of_one_name_are_told_apart_and_plans_are_known(
    command: Path, tmp_path: Path
) -> None:
    models = [fake_vllm.model(tmp_path / str(i) / "OUT", speed=i + 1) for i in range(2)]
    quantization = {
        "quant_method": "camera",
        "bits": [16],
        "layers": {},
        "recipe": pruning.RECIPE,
    }
    (models[1] / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    report = bench(models, BenchSettings(**SERVE_ONLY))
    assert [(m.name, m.plan) for m in report.models] == [("OUT", None), ("OUT (2)", "16:0.5,0:0.5")]
    assert [run.model for run in report.serving] == ["OUT", "OUT (2)"]


@pytest.mark.parametrize(
    ("behaviour", "message", "log"),
    [
        ({"fail": "serve"}, "vllm serve ended with code 1", "weight gone"),
        ({"fail": "bench serve"}, "vllm bench serve ended with code 1", "weight gone"),
        ({"fail": "under load"}, "vllm serve ended with code 7", "engine gone"),
        ({"unanswered": 3}, "vllm serve answered 5 of 8 requests under 2 at once", "Model loading"),
        ({"forget": ["output_throughput"]}, "vllm bench wrote no 'output_throughput'", ""),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_failure_names_what_failed_and_leaves_no_process(
    command: Path, tmp_path: Path, behaviour: dict[str, Any], message: str, log: str
) -> None:
    model = fake_vllm.model(tmp_path / "A", speed=20, **behaviour)
    with pytest.raises(VllmError) as caught:
        bench([model], BenchSettings(**SERVE_ONLY))
    assert caught.value.message.startswith(message)
    assert log in caught.value.log
    assert not any(fake_vllm.is_alive(call["pid"]) for call in fake_vllm.calls(command))


def test_what_cannot_work_is_refused_before_anything_runs(command: Path, tmp_path: Path) -> None:
    good = fake_vllm.model(tmp_path / "good", speed=20)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        bench([good, tmp_path / "empty"], BenchSettings(**SERVE_ONLY))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        bench([good, tmp_path / "empty"], BenchSettings(**SERVE_ONLY))
    with pytest.raises(VllmError, match=r"--threads 4096: this process may use \d+ cores"):
        bench([good], BenchSettings(threads=4096, **SERVE_ONLY))
    small = fake_vllm.model(tmp_path / "small", vocab_size=2048, speed=20)
    seeing = fake_vllm.model(tmp_path / "seeing", vocab_size=2048, nested=True, speed=20)
    for few in (small, seeing):
        with pytest.raises(
            VllmError, match=rf"below 10000, and .*{few.name} has 2048 tokens: leave"
        ):
            bench([good, few], BenchSettings())
    assert fake_vllm.calls(command) == []
    bench([small], BenchSettings(**SERVE_ONLY))
    assert len(fake_vllm.calls(command)) == 2
