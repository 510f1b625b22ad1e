"""What of the GPU benchmark runs without one; its Triton kernels in their interpreter."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import analysis, baselines, layers, serve
from bench.gpu.__main__ import keep, main, parse_options
from bench.gpu.layers import Candidate, WrongResultError, as_ragged, check_all, num_sets
from bench.gpu.random_layers import Tokens, ragged_layer, random_tokens, weight_bytes
from bench.gpu.tune_triton import write_tables
from bench.shapes.published import SHAPES, Shape
from camera_serve.benchmark.report import ThroughputRun
from camera_serve.kernels.triton import tuned
from camera_serve.ragged.layer import RaggedTier, dense_rows, ragged_moe
from camera_serve.recipe import TierPlan

CPU = torch.device("cpu")
TINY = Shape(
    num_experts=8, top_k=2, d_ff=64, d_model=128, shared_d_ff=32, config={}, layers=1, vocab=1
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Shape:
    monkeypatch.setitem(SHAPES, analysis.SHAPE, TINY)
    return TINY


def reference_call(plan: str) -> Candidate:
    layer = ragged_layer(TINY, TierPlan.parse(plan), 0, CPU)
    call = lambda t: ragged_moe(t.x, t.weights, t.ids, layer)  # noqa: E731
    return Candidate(call, weight_bytes(layer), layer)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--only", "layers"]) == 1
    assert capsys.readouterr().err == (
        "error: torch sees no CUDA device here: nothing to measure\n"
    )


def test_results_go_to_a_file_of_their_piece() -> None:
    assert parse_options(["--only", "serve"]).output.name == "gpu-serve.json"
    options = parse_options(["--only", "layers", "--tokens", "1", "64", "--shapes", "mixtral-8x7b"])
    assert options.tokens == [1, 64] and options.shapes == ["mixtral-8x7b"]


def test_every_measurement_is_on_disk_before_the_next(tmp_path: Path) -> None:
    output, found = tmp_path / "results" / "gpu.json", []

    def pieces() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"rows": list(range(number + 1)), "left": []}
            found.append(json.loads(output.read_text())["rows"])

    assert keep(pieces(), output, seconds=60)["rows"] == [0, 1, 2]
    assert found == [[0], [0, 1], [0, 1, 2]]
    assert json.loads(output.read_text())["environment"]["cores"] > 0


def test_a_piece_ends_while_there_is_time_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("bench.gpu.__main__.time.monotonic", lambda: clock[0])

    def pieces() -> Iterator[dict[str, Any]]:
        for number, seconds in enumerate((20.0, 150.0, 10.0, 10.0)):
            clock[0] += seconds
            yield {"rows": number, "left": [str(n) for n in range(number + 1, 4)]}

    # After 170 of 300 seconds, one that takes 150 again would be too much.
    result = keep(pieces(), tmp_path / "gpu.json", seconds=300)
    assert result == {"rows": 1, "left": ["2", "3"]}
    assert clock[0] == 170.0


def test_what_was_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = {"model": "dense", "output_tokens_per_second": 100.0}
    pieces = iter([{"runs": [run], "left": ["40% pruned", "2.25 bits"]}])
    monkeypatch.setattr(serve, "measure", lambda models, seed: pieces)
    assert main(["--only", "serve", "--output", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "       dense:      100 output tokens/s, 1.00x",
        "time is up; not measured: 40% pruned, 2.25 bits",
    ]


def test_serving_is_measured_with_cuda_graphs_model_by_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, seen = serve.SETTINGS.engine_flags, []
    assert "--enforce-eager" not in flags and flags[flags.index("--load-format") + 1] == "dummy"
    captured = json.loads(flags[flags.index("--compilation-config") + 1])
    assert captured["cudagraph_capture_sizes"][-1] == int(flags[flags.index("--max-num-seqs") + 1])

    def bench(model: Path, name: str, settings: object) -> ThroughputRun:
        config = json.loads((model / "config.json").read_text())
        seen.append((name, config["num_hidden_layers"], "quantization_config" in config))
        return ThroughputRun(
            model=name, requests=8, seconds=1.0, output_tokens_per_second=50.0 * len(seen)
        )

    monkeypatch.setattr(serve, "bench_throughput", bench)
    results = list(serve.measure(["dense", "40% pruned"]))
    assert seen == [("dense", 48, False), ("40% pruned", 48, True)]
    assert [len(result["runs"]) for result in results] == [2, 2]
    assert [result["left"] for result in results] == [["40% pruned"], []]
    assert serve.table(results[-1]).endswith("40% pruned:      100 output tokens/s, 2.00x")
    alone = {"runs": [results[-1]["runs"][1]]}
    assert serve.table(alone).endswith("40% pruned:      100 output tokens/s")


def test_layers_weigh_what_their_plan_says() -> None:
    dense = weight_bytes(ragged_layer(TINY, TierPlan.parse("16:1"), 0, CPU))
    assert dense == 3 * 8 * 64 * 128 * 2
    pruned = ragged_layer(TINY, TierPlan.prune(0.5), 0, CPU)
    assert weight_bytes(pruned) == 3 * pruned.tiers[0].offsets[-1] * 128 * 2
    # 2.25 bits of 16: one group of 128 for each row.
    assert weight_bytes(ragged_layer(TINY, TierPlan.parse("2:1"), 0, CPU)) == dense * 2.25 / 16


def test_random_weights_keep_the_size_of_what_goes_through() -> None:
    layer = ragged_layer(TINY, TierPlan.parse("3:0.5,2:0.5"), 0, CPU)
    for tier in layer.tiers:
        weights = dense_rows(tier.gate, slice(None), torch.float32)
        assert weights.std().item() == pytest.approx(128**-0.5, rel=0.02)


def test_tokens_go_to_experts_once_each() -> None:
    tokens = random_tokens(TINY, 200, 0, CPU, balanced=False)
    assert all(len(set(ids)) == 2 for ids in tokens.ids.tolist())
    torch.testing.assert_close(tokens.weights.sum(1), torch.ones(200))


def test_a_layer_that_is_right_passes() -> None:
    candidates = {plan: reference_call(plan) for plan in ("16:1", "3:0.2,2:0.6,1:0.2")}
    errors = check_all(TINY, candidates, (1, 33), 0, CPU, balanced=False)
    assert errors.keys() == candidates.keys()
    assert all(0 < error < layers.TOLERANCE for error in errors.values())


@pytest.mark.parametrize("wrong", [lambda out: out.roll(1, 1), lambda out: out * torch.nan])
def test_a_layer_that_is_wrong_is_not_timed(wrong: object) -> None:
    right = reference_call("16:1")
    broken = Candidate(lambda t: wrong(right.call(t)), right.bytes_, right.exact)
    with pytest.raises(WrongResultError, match="broken: relative error"):
        check_all(TINY, {"right": right, "broken": broken}, (1,), 0, CPU, balanced=True)


def test_every_number_of_tokens_is_checked_before_it_is_timed(
    tiny: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: Callable[..., Tokens] = layers.random_tokens
    monkeypatch.setattr(
        layers,
        "random_tokens",
        lambda shape, count, seed, device, balanced: tokens(shape, count, seed, CPU, balanced=True),
    )
    monkeypatch.setattr(layers, "ceilings", lambda device: {})
    monkeypatch.setattr(layers.baselines, "vllm_context", nullcontext)
    monkeypatch.setattr(layers, "compare", lambda runs, sets: dict.fromkeys(runs, 7.0))
    right = reference_call("16:1")
    wrong_from_64 = Candidate(
        lambda t: right.call(t) * (1 if len(t.x) < 64 else 2), right.bytes_, right.exact
    )
    monkeypatch.setattr(layers, "layers_of", lambda *_: {"ours": wrong_from_64})
    pieces = layers.measure([analysis.SHAPE], [4, 64], balanced=True)
    first = next(pieces)
    (row,) = first["rows"]
    assert (row["tokens"], row["microseconds"]) == (4, {"ours": 7.0})
    assert 0 < row["errors"]["ours"] < layers.TOLERANCE
    assert first["left"] == [f"{analysis.SHAPE} with 64 tokens"]
    with pytest.raises(WrongResultError, match="ours: relative error"):
        next(pieces)


def test_dense_weights_are_read_as_vllm_lays_them_out() -> None:
    w13, w2 = torch.randn(8, 128, 128) / 11, torch.randn(8, 128, 64) / 8
    x = torch.randn(1, 128)
    out = ragged_moe(x, torch.ones(1, 1), torch.tensor([[5]]), as_ragged(w13, w2))
    hidden = torch.nn.functional.silu(w13[5, :64] @ x[0]) * (w13[5, 64:] @ x[0])
    torch.testing.assert_close(out[0], w2[5] @ hidden, rtol=1e-4, atol=1e-5)


def test_few_tokens_rotate_among_many_inputs() -> None:
    shape = SHAPES["qwen3-30b-a3b"]
    assert num_sets(shape, 1, 170_000_000) == layers.MOST_SETS
    assert num_sets(shape, 8192, 170_000_000) == 3
    assert num_sets(shape, 8192, 1_200_000_000) == 2


def test_the_table_gives_ratios_to_the_best_dense_layer() -> None:
    times = {"vllm-triton": 30.0, "vllm-other": 20.0, "40%": 10.0}
    result = {
        "ceilings": {"copy_gb_per_second": 4000.0, "bf16_tflop_per_second": 700.0},
        "rows": [{"shape": "tiny", "tokens": 4, "microseconds": times}],
    }
    first, last = layers.table(result).splitlines()
    assert "dense     20.0 us" in first and first.endswith("40% 2.00x")
    assert last == "ceilings: copy 4000 GB/s, bf16 700 TFLOP/s"


def test_vllm_s_kernels_take_what_they_are_given() -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    config = baselines.moe_config(TINY, CPU)
    assert (config.num_experts, config.hidden_dim, config.intermediate_size) == (8, 128, 64)
    x, w13, w2 = torch.empty(1, 128), torch.empty(8, 128, 128), torch.empty(8, 128, 64)
    inspect.signature(fused_experts).bind(x, w13, w2, torch.empty(1, 2), torch.empty(1, 2))
    inspect.signature(unquantized.convert_to_unquantized_kernel_format).bind(
        None, moe_config=config, w13_weight=w13, w2_weight=w2
    )
    inspect.signature(unquantized.make_unquantized_moe_kernel).bind(None, config, None, None)
    given = ["hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation"]
    given += ["global_num_experts", "expert_map", "apply_router_weight_on_input"]
    inspect.signature(FusedMoEKernel.apply).bind(None, **dict.fromkeys(given))


def test_what_vllm_cannot_do_here_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*tokens: Tokens) -> Any:
        raise AttributeError("no such kernel")

    for make in (fails, lambda: {"": fails}):
        assert baselines.tried("humming 2 bits", TINY, CPU, make) == {}
        said = "left out: humming 2 bits: AttributeError: no such kernel"
        assert said in capsys.readouterr().err
    works = {"vllm": lambda tokens: tokens.x}
    assert baselines.tried("vllm", TINY, CPU, lambda: works) == works


def test_both_ways_to_the_energies_agree(tiny: Shape) -> None:
    tier = analysis.full_tier(tiny, 0, CPU)
    assert isinstance(tier, RaggedTier)
    batch = random_tokens(tiny, 64, 0, CPU, balanced=True)
    ours = analysis.camera_energies(tier, analysis.shared_expert(tiny, CPU), batch, rounds=2)
    theirs = analysis.every_expert_on_every_token(tier, batch, rounds=2)
    assert ours.shape == theirs.shape == (8 * 64,)
    assert (ours - theirs).norm() / theirs.norm() < analysis.AGREEMENT


def test_a_served_skeleton_has_a_config_and_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    serve.write_skeleton(folder, TierPlan.prune(0.4), layers=2, vocab=4096, seed=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["hidden_size"] == 2048
    counts = config["quantization_config"]["layers"]["model.layers.1.mlp"]["experts"]
    assert len(counts) == 128
    assert sum(map(sum, counts)) == pytest.approx(128 * 768 * 0.6, rel=0.01)
    assert not list(folder.glob("*.safetensors")) and (folder / "tokenizer.json").exists()


def test_tuned_tables_are_written_as_they_are_kept(tmp_path: Path) -> None:
    write_tables(tmp_path / "tuned.py", tuned.DEVICES, tuned.TABLES)
    assert (tmp_path / "tuned.py").read_text() == Path(tuned.__file__).read_text()


IN_THE_INTERPRETER = """
import torch
from bench.gpu import layers, random_layers
from camera_serve.recipe import TierPlan
from tests.bench.test_gpu import CPU, TINY
random_layers.DTYPE = layers.DTYPE = torch.float16
plans = {"40%": TierPlan.prune(0.4), "2.25 bits": TierPlan.mixed(2, 0.2)}
candidates = {
    name: layers.ragged_candidate(random_layers.ragged_layer(TINY, plan, 0, CPU))
    for name, plan in plans.items()
}
print(layers.check_all(TINY, candidates, (1, 33), 0, CPU, balanced=False))
"""


def test_our_layers_pass_the_check_in_the_interpreter() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2.25 bits" in done.stdout
