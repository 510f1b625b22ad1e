"""`inspect` reports the widths, bytes and shares that were put into a checkpoint."""

import json
from pathlib import Path

import pytest

from camera_serve.errors import CheckpointError
from camera_serve.evaluation.inspection import Inspection, LayerInspection, inspect
from tests import pruning, quantized, tiny_models

D_MODEL, D_FF, SHARED_D_FF, NUM_EXPERTS = 64, 64, 96, 8
MICRO_EXPERT_BYTES = 3 * D_MODEL * 2
WIDTHS = (0, 1, 7, 64, 33, 2, 0, 5)
SHARED_WIDTH = 41


def _width(expert: int, d_ff: int) -> int:
    return SHARED_WIDTH if expert < 0 else WIDTHS[expert]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def compressed(dense: Path, tmp_path: Path) -> Path:
    pruning.prune(dense, tmp_path / "out", _width)
    return tmp_path / "out"


def test_dense_checkpoint_keeps_everything(dense: Path) -> None:
    found = inspect(dense)
    assert found.plan is None
    assert found.removed_share == 0
    assert found.removed_parameter_share == 0
    for layer in found.layers:
        assert layer.expert_d_ff == (D_FF,) * NUM_EXPERTS
        assert layer.shared_d_ff == (SHARED_D_FF,)
        assert layer.expert_bytes == (NUM_EXPERTS * D_FF + SHARED_D_FF) * MICRO_EXPERT_BYTES
        assert layer.least_seen(3) == ()


def test_kept_widths_and_bytes_of_each_layer(compressed: Path) -> None:
    found = inspect(compressed)
    assert found.plan == "16:0.5,0:0.5"
    assert [layer.layer for layer in found.layers] == [0, 1]
    for layer in found.layers:
        assert layer.expert_d_ff == WIDTHS
        assert layer.shared_d_ff == (SHARED_WIDTH,)
        assert layer.micro_experts == sum(WIDTHS) + SHARED_WIDTH
        assert layer.width_range == (0, 3.5, 64)
        assert layer.expert_bytes == layer.micro_experts * MICRO_EXPERT_BYTES


def test_removed_shares_count_shared_experts_and_all_parameters(
    dense: Path, compressed: Path
) -> None:
    before, after = inspect(dense), inspect(compressed)
    kept = 2 * (sum(WIDTHS) + SHARED_WIDTH)
    original = 2 * (NUM_EXPERTS * D_FF + SHARED_D_FF)
    assert after.removed_share == pytest.approx(1 - kept / original)
    gone = 1 - after.num_parameters / before.num_parameters
    assert after.removed_parameter_share == pytest.approx(gone)
    assert before.total_bytes - after.total_bytes == (original - kept) * MICRO_EXPERT_BYTES
    assert before.expert_bytes - after.expert_bytes == (original - kept) * MICRO_EXPERT_BYTES


def test_least_seen_experts_come_from_the_report(compressed: Path) -> None:
    _write_report(compressed, tokens=[9, 0, 5, 0, 7, 8, 6, 1])
    layer = inspect(compressed).layers[1]
    assert layer.least_seen(4) == ((1, 0), (3, 0), (7, 1), (2, 5))


def test_a_foreign_report_is_refused_by_name(compressed: Path) -> None:
    (compressed / "camera_report.json").write_text('{"version": 1}')
    with pytest.raises(CheckpointError, match=r"camera_report\.json .*model"):
        inspect(compressed)


def test_one_wide_expert_among_empty_ones() -> None:
    layer = LayerInspection(0, (0, 12, 0), (), 48, 288, 64, (0, 3, 0))
    assert layer.width_range == (0, 0, 12)
    assert layer.removed_share == 0.75
    assert layer.bits_per_weight == 1.0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_every_naming_scheme_is_counted_once(family: str, tmp_path: Path) -> None:
    found = inspect(tiny_models.save(family, tmp_path / family))
    assert found.expert_bytes == sum(layer.expert_bytes for layer in found.layers)
    assert found.removed_share == 0
    assert len(found.layers) == 2


def test_json_has_the_same_values(compressed: Path) -> None:
    found: Inspection = inspect(compressed)
    data = json.loads(json.dumps(found.to_json()))
    assert data["removed_share"] == found.removed_share
    assert data["layers"][0]["expert_d_ff"] == list(WIDTHS)
    assert data["layers"][0]["expert_d_ff_min_median_max"] == [0, 3.5, 64]
    assert data["layers"][0]["tokens_per_expert"] is None


def _write_report(folder: Path, tokens: list[int]) -> None:
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]
    layers = [
        {
            "layer": f"model.layers.{layer}.mlp",
            "expert_d_ff": WIDTHS,
            "shared_d_ff": [SHARED_WIDTH],
            "tokens_per_expert": tokens,
            "energy_kept": 0.9,
        }
        for layer in range(2)
    ]
    found = inspect(folder)
    sizes = {
        "expert_bytes_before": 1,
        "expert_bytes_after": found.expert_bytes,
        "total_bytes_before": 1,
        "total_bytes_after": found.total_bytes,
    }
    report = {"model": "m", "recipe": recipe, "fingerprint": {}, "layers": layers, **sizes}
    (folder / "camera_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "granitemoe"])
def test_where_the_bytes_went_is_known_of_each_expert(family: str, tmp_path: Path) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    quantized.compress(model, tmp_path / "out", "16:0.1,3:0.2,2:0.4,1:0.1,0:0.2")
    structure = pruning.structure_of(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    # 32 weights in a group: a float16 scale and zero take one bit each per weight.
    bits = {16: 16.0, 3: 4.0, 2: 3.0, 1: 2.0}
    for layer in inspect(tmp_path / "out").layers:
        counts = config["layers"][structure.moe_prefix(layer.layer)]
        widths = [structure.d_ff] * structure.num_experts + [structure.shared_d_ff]
        tiers = [*counts["experts"], *counts["shared"]]
        wanted = [
            sum(n * bits[b] for n, b in zip(own, config["bits"], strict=True)) / width
            for own, width in zip(tiers, widths, strict=False)
        ]
        assert layer.expert_bits == pytest.approx(wanted)
        low, median, high = layer.expert_bits_range
        assert low == pytest.approx(min(wanted[: structure.num_experts]))
        assert low <= median <= high <= 16
        columns = zip(*tiers, strict=True)
        held = {b: sum(column) for b, column in zip(config["bits"], columns, strict=True)}
        gone = structure.micro_experts_per_layer - sum(held.values())
        assert layer.micro_experts_at == held | {0: gone}
        total = sum(held[b] * bits[b] for b in held) / structure.micro_experts_per_layer
        assert layer.bits_per_original_weight == pytest.approx(total)


def test_a_dense_model_takes_16_bits_everywhere(dense: Path) -> None:
    for layer in inspect(dense).layers:
        assert set(layer.expert_bits) == {16.0}
        assert layer.micro_experts_at == {16: layer.original_micro_experts, 0: 0}
