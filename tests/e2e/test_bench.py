"""`camera-serve bench` with the real `vllm`: the reference MoE against a copy with half removed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.reference import MODEL
from camera_serve.benchmark.report import BenchReport
from camera_serve.cli import main
from tests import pruning

pytestmark = pytest.mark.e2e

MIB = 2**20


def test_real_servers_are_measured_and_compared(tmp_path: Path) -> None:
    pruned, output = tmp_path / "pruned", tmp_path / "bench.json"
    pruning.prune(MODEL, pruned, lambda expert, d_ff: d_ff // 2)
    few = ("--repeats", 1, "--num-prompts", 4, "--input-len", 32, "--output-len", 16)
    loads = ("--modes", "serve", "--concurrency", 1)
    flags = ("--enforce-eager", "--max-num-seqs", 8, "--max-num-batched-tokens", 256)
    guessing = {"method": "draft_model", "model": str(pruned), "num_speculative_tokens": 2}
    flags += ("--speculative-config", json.dumps(guessing))
    # vLLM's benchmark leaves the temperature to the server: 1, where guesses are worth less.
    flags += ("--override-generation-config", '{"temperature": 0}')
    arguments = ["bench", MODEL, pruned, "-o", output, *few, *loads, "--", *flags]
    result = CliRunner().invoke(main, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    report = BenchReport.model_validate_json(output.read_text())
    assert [(m.name, m.plan) for m in report.models] == [
        ("model", None),
        ("pruned", "16:0.5,0:0.5"),
    ]
    assert [run.model for run in report.serving] == ["model", "pruned"]
    for served in report.serving:
        # What vLLM says of speed and time is the same 4 answers of 16 tokens.
        assert served.output_tokens_per_second * served.seconds == pytest.approx(64, rel=1e-3)
        assert served.total_tokens_per_second * served.seconds == pytest.approx(192, rel=1e-3)
        answer = served.ttft_ms.mean + 15 * served.tpot_ms.mean
        # One after another, with only the client's own work in between.
        assert 700 * served.seconds < 4 * answer < 1001 * served.seconds
    # The copy with half removed guesses for both, and hardly ever errs about itself: in bfloat16 a
    # batch of guesses may round otherwise than one token does.
    of_the_original, of_itself = (run.drafts for run in report.serving)
    assert of_the_original and of_itself
    assert 0 < of_the_original.accepted_share < of_itself.accepted_share
    assert of_itself.accepted_share > 0.9
    assert "drafts accepted" in result.stdout
    assert all(m.peak_resident_bytes and m.peak_resident_bytes > 500 * MIB for m in report.memory)
    assert report.environment.packages["vllm"].startswith("0.")
    assert "×)" in result.stdout
