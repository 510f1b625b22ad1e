"""`python -m camera_serve.hf MODULE` runs a program that knows nothing of CAMERA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import camera_serve.hf  # noqa: F401
from camera_serve.hf.__main__ import main
from tests import quantized, tiny_models

TOKENS = [42, 71, 78, 78, 81, 9, 200, 31]
PROGRAM = f"""
import sys, torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    path = sys.argv[sys.argv.index("--model_args") + 1].removeprefix("pretrained=")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        print(model(torch.tensor([{TOKENS}])).logits.sum().item())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("main")
    dense = tiny_models.save("qwen2_moe", root / "dense", dtype=torch.float32)
    quantized.compress(dense, root / "out", "4:0.5,2:0.3,0:0.2")
    return root / "out"


def test_the_card_s_command_loads_the_model_in_a_program_of_that_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    card = (checkpoint / "README.md").read_text()
    (command,) = re.findall(r"^    python (-m camera_serve.hf .*)$", card, re.MULTILINE)
    arguments = command.replace("$MODEL", str(checkpoint)).split()
    (tmp_path / "lm_eval.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits.sum().item()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_moe", "qwen3_vl_moe"])
def test_the_card_names_that_command_where_the_class_that_it_uses_loads_the_model(
    family: str, tmp_path: Path
) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    quantized.compress(dense, tmp_path / "out", "16:0.5,0:0.5")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    loads = type(config) in AutoModelForCausalLM._model_mapping
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("lm_eval --model hf" in card) == ("in vLLM or in transformers:" in card) == loads
    assert "    lm_eval --model vllm --model_args pretrained=$MODEL --tasks wikitext\n" in card


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m camera_serve.hf", "no_such_module", "-x"])
    with pytest.raises(SystemExit, match="no_such_module is not installed"):
        main()


def test_naming_no_program_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m camera_serve.hf"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m camera_serve.hf MODULE")
