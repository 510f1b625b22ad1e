"""Every command and Python example of README.md, CONTRIBUTING.md and docs/ runs, on a tiny model.

Substituted: the names `MODEL`, `OUT`, `DIR` and `TEXT` by paths. The calibration is cut to a few
short windows, and each example finds a machine where its output folder does not exist yet, unless
it says `--resume` or `--overwrite`. `bench` meets a fake `vllm`. Programs of `bench/` take long:
they must exist and know the flags, and their own tests run them. The rest is in `RUN_ELSEWHERE`.
"""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import statistics
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import coverage, data_flow, stored, summary
from bench.quality import drafts, pruning, quantization, steps
from bench.speed import tiers
from bench.speed.kernel_report import KernelReport, markdown
from camera_serve.benchmark.report import BenchReport
from camera_serve.benchmark.settings import Load
from camera_serve.cli import main
from tests import tiny_models
from tests.benchmark import fake_vllm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT_BENCH = ["--modes", "serve", "--repeats", "1"]
SHORT_CALIBRATION = ["--samples", "4", "--seq-len", "64"]
DRAFT = '{"method": "draft_model", "model": "OUT", "num_speculative_tokens": 3}'
RUN_ELSEWHERE = {
    "vllm serve OUT": "tests/e2e/test_server.py",
    f"vllm serve MODEL --speculative-config '{DRAFT}'": "tests/e2e/test_drafts.py",
    f"camera-serve bench MODEL -- --speculative-config '{DRAFT}' --override-generation-config "
    """'{"temperature": 0}'""": "tests/e2e/test_bench.py",
    """vllm serve OUT --speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'""": (
        "tests/e2e/test_drafts.py"
    ),
    "camera-serve compress FP8MODEL -o OUT --prune 0.4 --calibration TEXT --keep-fp8": (
        "tests/cli/test_published.py"
    ),
    "make setup": ".ci/run",
    "make test": ".ci/run",
    "make format": ".ci/run",
    "make demo": "tests/e2e/test_reference_moe.py",
    "pip install 'camera-serve[vllm]'": "tests/test_project.py",
    "pip install '.[vllm]'": "tests/test_project.py",
    "pip install 'camera-serve[vllm,evaluation]'": "tests/test_project.py",
    "lm_eval --model vllm --model_args pretrained=OUT --tasks wikitext": "tests/e2e/test_server.py",
    "python -m camera_serve.hf lm_eval --model hf --model_args pretrained=OUT --tasks wikitext": (
        "tests/hf/test_main.py"
    ),
}
"""By command, what runs it, or its parts where it needs a machine that is not there."""

NEEDS_DOCKER = "docker "

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.M)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[str]:
    """Lines of the blocks of commands, those of `console` and those without a language."""
    joined = "".join(blocks(page, "console") + blocks(page, "")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("docs")
    tiny_models.save("qwen2_moe", folder / "model")
    (folder / "text.txt").write_text("".join(page.read_text() for page in PAGES))
    paths = {"MODEL": "model", "TEXT": "text.txt", "OUT": "out", "DIR": "dir"}
    found = {name: str(folder / path) for name, path in paths.items()}
    run("camera-serve compress MODEL -o OUT --prune 0.4 --calibration TEXT", found)
    return found


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


def check_program(command: str) -> None:
    """A `python -m` command: its module has the flags, or is pytest with folders that exist."""
    module, *arguments = shlex.split(command)[2:]
    if module == "pytest":
        assert all((ROOT / a).exists() for a in arguments if "/" in a or a == "tests"), command
        return
    assert importlib.util.find_spec(module), command
    flags = [argument for argument in arguments if argument.startswith("--")]
    if flags or arguments:
        known = usage(module)
        assert all(flag in known for flag in flags), command


@functools.cache
def usage(module: str) -> str:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit), warnings.catch_warnings():
            # That it is imported already: nothing but its parser runs.
            warnings.simplefilter("ignore", RuntimeWarning)
            runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


@every_page
def test_every_command_runs(
    page: Path, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if command in RUN_ELSEWHERE:
            assert (ROOT / RUN_ELSEWHERE[command]).exists(), command
        elif command.startswith("camera-serve "):
            run(command, names)
        elif re.match(r"(\.venv/bin/)?python -m ", command):
            check_program(command)
        else:
            assert command.startswith(NEEDS_DOCKER), command


def test_every_subcommand_is_explained() -> None:
    ours = [c for page in PAGES for c in commands(page) if c.startswith("camera-serve ")]
    assert {command.split()[1] for command in ours} == set(main.commands)


@every_page
def test_python_examples_run(page: Path, names: dict[str, str]) -> None:
    for example in blocks(page, "python"):
        if "OpenAI" in example:
            compile(example, page.name, "exec")
            continue
        if "output=" in example:
            shutil.rmtree(names["OUT"])
        short = example.replace("samples=128", "samples=4, seq_len=64")
        exec(substituted(short, names), {})


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@every_page
def test_links_to_headings_name_one(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        if "://" not in target:
            text = (page.parent / target if target else page).read_text()
            headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
            kept = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in kept, f"{page.name}: {target}#{anchor}"


def test_readme_leads_to_every_page() -> None:
    text = PAGES[0].read_text()
    missing = [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in text]
    assert not missing


def test_the_first_screen_holds_the_commands_and_one_table() -> None:
    lines = PAGES[0].read_text().splitlines()
    commands_end = max(i for i, line in enumerate(lines) if line.startswith("vllm serve"))
    assert commands_end < 40 and len(lines) < 80


def test_tables_hold_the_stored_figures() -> None:
    kernels = KernelReport.read(ROOT / "bench" / "results" / "kernels-cpu.json")
    quantized = stored.stored(quantization.RESULTS, quantization.RESULT_VERSION)
    pruned = stored.stored(pruning.RESULTS, pruning.RESULT_VERSION)
    guessed = stored.stored(drafts.RESULTS, drafts.RESULT_VERSION)
    tables = {
        "summary": (stored.README, summary.render()),
        "coverage": (coverage.PAGE, coverage.render()),
        "quality": (stored.DOCS / "quality.md", pruning.render(pruned)),
        "quantization": (stored.DOCS / "quality.md", quantization.render(quantized)),
        "steps": (
            stored.DOCS / "quality.md",
            steps.render(stored.stored(steps.RESULTS, steps.RESULT_VERSION)),
        ),
        "tiers": (
            stored.DOCS / "speed.md",
            tiers.render(stored.stored(tiers.RESULTS, tiers.RESULT_VERSION)),
        ),
        "kernels": (stored.DOCS / "speed.md", markdown(kernels)),
        "drafts": (stored.DOCS / "serving.md", drafts.render(guessed)),
    }
    for name, (page, table) in tables.items():
        text = page.read_text()
        assert stored.with_table(text, name, table) == text, name


def test_serving_figures_are_the_stored_ones() -> None:
    path = ROOT / "bench" / "results" / "serve-qwen3-30b-a3b-4-layers.json"
    report = BenchReport.model_validate_json(path.read_text())
    page = (stored.DOCS / "speed.md").read_text()

    def speed(model: str, load: Load) -> float:
        return statistics.median(r.output_tokens_per_second for r in report.runs(model, load))

    for load in report.settings.loads:
        dense = speed("b-dense", load)
        gains = [f"{speed(model, load) / dense:.2f}×" for model in ("b-pruned40", "b-bits2")]
        assert f"| {load.concurrency} | {' | '.join(gains)} |" in page
    words = " ".join(page.split())
    settings = report.settings
    assert f"{settings.input_len} tokens in, {settings.output_len} out" in words


def test_the_picture_of_the_folders_is_of_today_s_folders() -> None:
    assert data_flow.PICTURE.read_text() == data_flow.draw()
    package = ROOT / "camera_serve"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert set(data_flow.PLACES) == (folders | {"converters"}) - {"cli"}
