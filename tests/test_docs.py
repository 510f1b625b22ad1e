"""Every command and Python example of the README runs, on a tiny model.

Substituted: the names `MODEL`, `OUT`, `DIR` and `TEXT` by paths. The calibration is cut to a few
short windows, and each example finds a machine where its output folder does not exist yet, unless
it says `--resume` or `--overwrite`. `bench` meets a fake `vllm`; what else needs a server is run by
the tests in `tests/e2e`.
"""

import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import stored
from bench.quality import pruning, quantization
from bench.speed.kernel_report import KernelReport, markdown
from camera_serve.benchmark.report import BenchReport
from camera_serve.benchmark.settings import Load
from camera_serve.cli import main
from tests import tiny_models
from tests.benchmark import fake_vllm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT_BENCH = ["--modes", "serve", "--repeats", "1"]
SHORT_CALIBRATION = ["--samples", "4", "--seq-len", "64"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    joined = "".join(blocks("console")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("readme")
    tiny_models.save("qwen2_moe", folder / "model")
    (folder / "text.txt").write_text(README)
    paths = {"MODEL": "model", "TEXT": "text.txt", "OUT": "out", "DIR": "dir"}
    return {name: str(folder / path) for name, path in paths.items()}


def substituted(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\b(MODEL|TEXT|OUT|DIR)\b", lambda match: names[match[1]], text)


def run(command: str, names: dict[str, str]) -> None:
    arguments = shlex.split(substituted(command, names))[1:]
    if arguments[0] in ("compress", "analyze") and "--recipe" not in arguments:
        arguments += SHORT_CALIBRATION
    if arguments[0] == "bench":
        arguments[1:1] = SHORT_BENCH
    if "-o" in arguments and not {"--resume", "--overwrite"} & set(arguments):
        shutil.rmtree(arguments[arguments.index("-o") + 1], ignore_errors=True)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, f"{command}\n{result.output}"


def test_every_command_runs(
    names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = [command for command in commands() if command != "vllm serve OUT"]
    assert {command.split()[0] for command in ours} == {"camera-serve"}
    assert {command.split()[1] for command in ours} == set(main.commands)
    for command in ours:
        run(command, names)
    assert Path(names["OUT"], "config.json").is_file()


def test_python_examples_run(names: dict[str, str]) -> None:
    run("camera-serve compress MODEL -o OUT --prune 0.4 --calibration TEXT --overwrite", names)
    compress, load, client = blocks("python")
    shutil.rmtree(names["OUT"])
    exec(substituted(compress, names).replace("samples=128", "samples=4, seq_len=64"), {})
    exec(substituted(load, names), {})
    compile(client, "README.md", "exec")


def test_tables_hold_the_stored_figures() -> None:
    tables = {
        "quality": pruning.render(stored.stored(pruning.RESULTS, pruning.RESULT_VERSION)),
        "kernels": markdown(KernelReport.read(ROOT / "bench" / "results" / "kernels-cpu.json")),
        "quantization": quantization.render(
            stored.stored(quantization.RESULTS, quantization.RESULT_VERSION)
        ),
    }
    for name, table in tables.items():
        assert stored.with_table(README, name, table) == README, name


def test_serving_figures_are_the_stored_ones() -> None:
    path = ROOT / "bench" / "results" / "serve-qwen3-30b-a3b-4-layers.json"
    report = BenchReport.model_validate_json(path.read_text())

    def speed(model: str, load: Load) -> float:
        return statistics.median(r.output_tokens_per_second for r in report.runs(model, load))

    for load in report.settings.loads:
        dense = speed("b-dense", load)
        gains = [f"{speed(model, load) / dense:.2f}×" for model in ("b-pruned40", "b-bits2")]
        assert f"| {load.concurrency} | {' | '.join(gains)} |" in README
    words = " ".join(README.split())
    settings = report.settings
    assert f"{settings.input_len} tokens in, {settings.output_len} out" in words
