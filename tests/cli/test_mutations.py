"""Files of a checkpoint changed field by field: every command answers with success or one error.

And `verify` finds every change of a file that an engine reads.
"""

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from camera_serve.checkpoint.report import REPORT_FILE
from camera_serve.cli import main
from camera_serve.compression import sizing
from tests import mutations, tiny_models
from tests.editing import digest
from tests.mutations import Mutation

SEED = 1
PLANS = {"pruned": "16:0.5,0:0.5", "packed": "16:0.2,3:0.2,2:0.4,0:0.2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a pruned and a quantized one made of it, and a text."""
    folder = tmp_path_factory.mktemp("mutations")
    tiny_models.save("qwen2_moe", folder / "dense")
    (folder / "text.txt").write_text(Path(tiny_models.__file__).read_text())
    for name, plan in PLANS.items():
        packed = ["--group-size", "32"] if name == "packed" else []
        arguments = ["--plan", plan, "--align", "8", *packed, *_calibration(folder)]
        assert _run("compress", folder / "dense", "-o", folder / name, *arguments).exit_code == 0
    analyzed = _run("analyze", folder / "dense", "-o", folder / "analysis", *_calibration(folder))
    assert analyzed.exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # --dry-run measures the machine, which no file changes, and takes most of the time.
    monkeypatch.setattr(sizing, "_flops_per_second", lambda dtype, device: 1e10)


def _calibration(folder: Path) -> list[str]:
    return ["--calibration", str(folder / "text.txt"), "--samples", "4", "--seq-len", "64"]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _arguments(folder: Path, model: str, command: str) -> list[object]:
    """A command that reads `folder / model`, and writes, if it does, to `folder / "out"`."""
    path, out, text = folder / model, ["-o", folder / "out"], _calibration(folder)
    compress = ["compress", path, *out, "--prune", "0.5", "--align", "8", *text]
    return {
        "inspect": ["inspect", path],
        "verify": ["verify", path],
        "verify --against": ["verify", path, "--against", folder / "dense"],
        "verify pruned --against": ["verify", folder / "pruned", "--against", path],
        "convert": ["convert", path, "--to", "dense", *out],
        "analyze": ["analyze", path, *out, *text],
        "compress": compress,
        "compress --dry-run": [*compress, "--dry-run"],
        "compress --analysis": [
            *("compress", folder / "dense", *out, "--bits-per-weight", "2.5", "--align", "8"),
            *("--group-size", "32", "--analysis", path, "--dry-run"),
        ],
        "compress --resume": [
            *("compress", folder / "dense", "-o", path, "--plan", PLANS["pruned"], "--align", "8"),
            *(*text, "--resume"),
        ],
    }[command]


DENSE = (
    *("inspect", "verify", "verify pruned --against"),
    *("analyze", "compress", "compress --dry-run"),
)
COMPRESSED = ("inspect", "verify", "verify --against", "convert", "compress")


def _fault(result: Result) -> str:
    """What is wrong with an answer: neither a success nor one line of error."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"raised {result.exception!r}"
    if "Traceback" in result.output:
        return "printed a traceback"
    if result.exit_code == 0:
        return "" if result.stdout else "says nothing"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exit_code != 1 or len(errors) != 1 or result.stderr.splitlines()[-1] != errors[0]:
        return f"ended with code {result.exit_code} and said {result.stderr!r}"
    return "printed beside its error" if result.stdout else ""


def _left_behind(folder: Path, result: Result) -> str:
    """What a command should not have left, or have written otherwise."""
    out = folder / "out"
    left = [path for path in folder.iterdir() if path.name.startswith("out")]
    if result.exit_code:
        return f"left {left}" if left else ""
    if (out / REPORT_FILE).exists():
        verified = _run("verify", out)
        return f"wrote what verify refuses: {verified.stderr}" if verified.exit_code else ""
    return ""


def _faults(
    folder: Path, model: str, file: str, mutated: Iterable[Mutation], commands: tuple[str, ...]
) -> list[str]:
    """Run the commands on every mutation of one file; what was wrong with their answers."""
    path, faults = folder / model / file, []
    before = path.read_bytes()
    checked = model != "dense" and file != REPORT_FILE
    try:
        for mutation in mutated:
            path.write_bytes(mutation.content)
            for command in commands:
                result = _run(*_arguments(folder, model, command))
                fault = _fault(result) or _left_behind(folder, result)
                if checked and command.startswith("verify") and result.exit_code == 0:
                    fault = fault or "found nothing"
                if fault:
                    faults.append(f"{command} of {model}/{file}, {mutation.name}: {fault}")
                shutil.rmtree(folder / "out", ignore_errors=True)
    finally:
        path.write_bytes(before)
    return faults


def _mutated_json(file: Path, count: int) -> Iterable[Mutation]:
    content = file.read_bytes()
    yield from mutations.mutated_files(content)
    yield from mutations.mutated_fields(json.loads(content), random.Random(SEED), count)


@pytest.mark.parametrize(
    ("model", "file", "count", "commands"),
    [
        ("dense", "config.json", 3, DENSE),
        ("dense", "generation_config.json", 1, ("compress",)),
        ("dense", "tokenizer_config.json", 2, ("analyze", "compress", "compress --dry-run")),
        ("pruned", "config.json", 1, COMPRESSED),
        ("packed", "config.json", 2, COMPRESSED),
        ("pruned", "generation_config.json", 2, ("verify",)),
        ("pruned", "tokenizer_config.json", 2, ("verify", "convert")),
        ("pruned", "hf_quant_config.json", 8, ("inspect", "verify")),
        ("analysis", "camera_analysis.json", 1, ("compress --analysis",)),
        ("pruned", "camera_report.json", 1, ("inspect", "verify", "compress --resume")),
    ],
)
def test_a_changed_field_is_one_error_or_harmless(
    folder: Path, model: str, file: str, count: int, commands: tuple[str, ...]
) -> None:
    before = digest(folder)
    mutated = _mutated_json(folder / model / file, count)
    assert _faults(folder, model, file, mutated, commands) == []
    assert digest(folder) == before


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_a_changed_setting_of_any_family_is_one_error_or_harmless(
    family: str, tmp_path: Path
) -> None:
    tiny_models.save(family, tmp_path / "dense")
    mutated = _mutated_json(tmp_path / "dense" / "config.json", 2)
    assert _faults(tmp_path, "dense", "config.json", mutated, ("inspect",)) == []


def test_a_changed_index_is_one_error_or_harmless(folder: Path) -> None:
    name = "model.safetensors.index.json"
    content = (folder / "pruned" / name).read_bytes()
    # One tensor of each file: they are told apart by their shards alone.
    index = json.loads(content)
    last = {shard: tensor for tensor, shard in index["weight_map"].items()}.values()
    draw = random.Random(SEED)
    paths = [("metadata",), ("metadata", "total_size"), ("weight_map",)]
    paths += [("weight_map", tensor) for tensor in last]
    mutated = [
        *mutations.mutated_files(content),
        *(
            mutations.mutated_field(index, path, kind)
            for path in paths
            for kind in draw.sample(list(mutations.KINDS), 6)
        ),
    ]
    assert _faults(folder, "pruned", name, mutated, COMPRESSED) == []


@pytest.mark.parametrize("model", ["dense", "pruned", "packed"])
def test_a_changed_header_is_one_error_or_harmless(folder: Path, model: str) -> None:
    file = sorted((folder / model).glob("*.safetensors"))[-1]
    mutated = mutations.mutated_headers(file.read_bytes(), random.Random(SEED), 2)
    commands = DENSE if model == "dense" else COMPRESSED
    assert _faults(folder, model, file.name, mutated, commands) == []


def test_a_changed_header_of_a_survey_is_one_error(folder: Path) -> None:
    content = (folder / "analysis" / "survey.safetensors").read_bytes()
    for mutation in mutations.mutated_headers(content, random.Random(SEED), 1):
        mutated = [mutation]
        faults = _faults(
            folder, "analysis", "survey.safetensors", mutated, ("compress --analysis",)
        )
        assert faults == []


def test_a_changed_recipe_is_one_error_or_another_recipe(folder: Path) -> None:
    content = (folder / "packed" / "camera_recipe.yaml").read_bytes()
    draw = random.Random(SEED)
    # JSON is YAML.
    mutated = [
        *mutations.mutated_files(content),
        *mutations.mutated_fields(yaml.safe_load(content), draw, 5),
    ]
    file, faults = folder / "recipe.yaml", []
    for mutation in mutated:
        file.write_bytes(mutation.content)
        arguments = ["-o", folder / "out", "--recipe", file, "--dry-run"]
        fault = _fault(_run("compress", folder / "dense", *arguments))
        faults += [f"{mutation.name}: {fault}"] if fault else []
    file.unlink()
    assert faults == []
    # The one beside a checkpoint is a copy for people: config.json holds what was done.
    beside = folder / "packed" / "camera_recipe.yaml"
    beside.write_bytes(b"")
    assert _run("verify", folder / "packed").exit_code == 0
    beside.write_bytes(content)


def test_mutations_reach_every_setting(folder: Path) -> None:
    config = json.loads((folder / "packed" / "config.json").read_bytes())
    reached = set(mutations.fields(config))
    layer = ("quantization_config", "layers", "model.layers.1.mlp")
    assert {(key,) for key in config} <= reached
    assert {("rope_parameters", "rope_type"), (*layer, "shared", 0, 2)} <= reached
    assert {(*layer, "experts", expert, tier) for expert in (0, 7) for tier in (0, 2)} <= reached
    changed = mutations.mutated_field(config, ("rope_parameters", "rope_theta"), "twice")
    assert (
        b'"rope_theta": 10000.0, "rope_type": "default", "rope_theta": 10001.0' in changed.content
    )
