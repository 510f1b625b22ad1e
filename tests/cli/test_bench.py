"""`camera-serve bench`, with a fake `vllm`: what users see, and what is left when it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camera_serve.benchmark.report import BenchReport
from camera_serve.checkpoint.lock import sole_writer
from tests.benchmark import fake_vllm
from tests.cli.conftest import Run

SERVE = ("--modes", "serve", "--concurrency", 1, "--repeats", 1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return fake_vllm.install(monkeypatch, tmp_path)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    speeds = {"dense": 20, "pruned": 30}
    return [fake_vllm.model(tmp_path / name, speed=speed) for name, speed in speeds.items()]


def test_the_report_is_written_and_shown_with_ratios(
    run: Run, command: Path, models: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    modes = ("--modes", "serve, throughput", "--repeats", 1)
    loads = ("--concurrency", 2, "--request-rate", 0.5)
    result = run("bench", *models, "-o", output, *modes, *loads, "--", "--enforce-eager", "-tp", 2)
    assert result.exit_code == 0, result.output
    for words in ("60 (1.50×)", "2 at once", "0.5/s"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == f"wrote {output}"
    assert "  vllm bench serve, 2 at once: 60.0 output tokens/s" in result.stderr.splitlines()
    report = BenchReport.model_validate_json(output.read_text())
    assert report.settings.vllm_flags == ("--enforce-eager", "-tp", "2")
    assert [m.name for m in report.models] == ["dense", "pruned"]
    engines = [c for c in fake_vllm.calls(command) if c["mode"] != "bench serve"]
    assert all(call["arguments"][-3:] == ["--enforce-eager", "-tp", "2"] for call in engines)


def test_defaults_are_two_passes_of_one_and_sixteen_at_once(
    run: Run, command: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("bench", models[0]).exit_code == 0
    report = BenchReport.model_validate_json(Path("camera_bench.json").read_text())
    assert report.settings.concurrencies == (1, 16) and report.settings.repeats == 2
    assert len(report.serving) == 4 and len(report.throughput) == len(report.latency) == 2


def test_an_existing_report_is_refused_before_the_work_and_replaced_on_demand(
    run: Run, command: Path, models: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    refused = run("bench", models[0], "-o", output, *SERVE)
    assert refused.exit_code == 1 and refused.stderr.startswith(f"error: {output} exists")
    assert output.read_text() == "mine" and fake_vllm.calls(command) == []
    assert run("bench", models[0], "-o", output, *SERVE, "--overwrite").exit_code == 0
    assert json.loads(output.read_text())["version"] == 1
    nowhere = run("bench", models[0], "-o", tmp_path / "no" / "out.json", *SERVE)
    assert nowhere.exit_code == 1 and "there is no folder" in nowhere.stderr


def test_a_report_that_another_bench_writes_is_refused_before_the_work(
    run: Run, command: Path, models: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    with sole_writer(output, "bench"):
        result = run("bench", models[0], "-o", output, *SERVE, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {output} is being written by camera-serve bench (pid ")
    assert fake_vllm.calls(command) == []
    assert not list(tmp_path.glob("out.*"))


def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    run: Run,
    command: Path,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("camera_serve.benchmark.plot.require_plots", lambda: None)
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    for plot, problem in ((mine, "exists"), (tmp_path / "no" / "p.png", "there is no folder")):
        refused = run("bench", models[0], "-o", tmp_path / "out.json", "--plot", plot, *SERVE)
        assert refused.exit_code == 1 and problem in refused.stderr
    assert fake_vllm.calls(command) == []


def test_a_dying_server_gives_its_last_words_and_one_line(
    run: Run, command: Path, tmp_path: Path
) -> None:
    model = fake_vllm.model(tmp_path / "model", speed=20, fail="serve")
    output = tmp_path / "out.json"
    result = run("bench", model, "-o", output, *SERVE)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        "weight gone",
        "error: vllm serve ended with code 1",
    ]
    assert result.stdout == "" and not output.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--modes", "serve,speed"], "'speed' is not one of serve, throughput, latency"),
        (["--modes", "latency", "--plot", "bench.png"], "--plot"),
        (["--concurrency", "0"], "--concurrency"),
        (["--request-rate", "0"], "--request-rate"),
        (["--output-len", "1"], "--output-len"),
        (["--repeats", "0"], "--repeats"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_bad_setting_is_a_usage_error_that_names_its_flag(
    run: Run, command: Path, models: list[Path], flags: list[str], named: str
) -> None:
    result = run("bench", models[0], *flags)
    assert result.exit_code == 2
    assert named in result.stderr.splitlines()[-1]
    assert fake_vllm.calls(command) == []


def test_a_model_that_is_not_there_is_one_line(run: Run, command: Path, tmp_path: Path) -> None:
    result = run("bench", tmp_path / "nothing", "-o", tmp_path / "out.json")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'nothing'} is neither a local folder")
    assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_ends_the_server_too(command: Path, tmp_path: Path) -> None:
    model = fake_vllm.model(tmp_path / "model", speed=20, hang="bench serve")
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from camera_serve.benchmark import process\n"
        f"process.vllm_command = lambda: {str(command)!r}\n"
        "import camera_serve.cli; camera_serve.cli.main(prog_name='camera-serve')"
    )
    arguments = ["bench", str(model), "-o", str(tmp_path / "out.json"), *map(str, SERVE)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while len(fake_vllm.calls(command)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in stderr
    started = fake_vllm.calls(command)
    assert [call["mode"] for call in started] == ["serve", "bench serve"]
    assert not any(fake_vllm.is_alive(call["pid"]) for call in started)
    assert not (tmp_path / "out.json").exists()
