import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.shapes import random_model
from bench.shapes.published import SHAPES, Shape, layer_counts, layer_energies
from bench.shapes.random_model import write_model
from camera_serve.checkpoint.experts import read_experts
from camera_serve.checkpoint.lock import sole_writer
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.workspace import Workspace
from camera_serve.errors import OutputError
from camera_serve.evaluation.verification import verify
from camera_serve.models import describe
from camera_serve.models.deepseek import register_deepseek
from camera_serve.ragged.layer import RaggedTier, Rows, dense_rows
from camera_serve.recipe import Calibration, Recipe, TierPlan
from tests.editing import digest
from tests.races import in_child

VOCAB = 2600
SMALL = Shape(
    num_experts=32,
    top_k=4,
    d_ff=64,
    d_model=128,
    shared_d_ff=96,
    config={
        "model_type": "qwen2_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "num_experts": 32,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    },
    layers=2,
    vocab=VOCAB,
)


def _recipe(plan: str) -> Recipe:
    calibration = Calibration(source="none")
    return Recipe.paper(plan=TierPlan.parse(plan), calibration=calibration, align=8, group_size=32)


def _write(path: Path, plan: str | None = None, *, balanced: bool = False) -> Path:
    recipe = _recipe(plan) if plan else None
    write_model(SMALL, path, layers=2, vocab=VOCAB, recipe=recipe, seed=5, balanced=balanced)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("random") / "dense")


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_says_the_sizes_of_its_shape(name: str) -> None:
    register_deepseek()
    shape = SHAPES[name]
    config = AutoConfig.for_model(
        **shape.config,
        hidden_size=shape.d_model,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=shape.layers,
    )
    found = describe(config)
    assert len(found.moe_layers) == shape.layers
    assert (found.num_experts, found.top_k, found.d_ff, found.d_model, found.shared_d_ff) == (
        *(shape.num_experts, shape.top_k, shape.d_ff, shape.d_model, shape.shared_d_ff),
    )


def test_a_dense_model_answers_in_transformers(dense: Path) -> None:
    checkpoint = Checkpoint.open(dense)
    assert {entry.dtype for entry in checkpoint.entries.values()} == {"BF16"}
    assert len({entry.file for entry in checkpoint.entries.values()}) == 3
    down = checkpoint.get("model.layers.1.mlp.experts.31.down_proj.weight").float()
    # 8192 values: their standard deviation is known to 0.8%.
    assert float(down.std()) == pytest.approx(0.02, rel=0.04)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    logits = model(torch.tensor([[5, 2500, 31]])).logits
    assert logits.shape == (1, 3, VOCAB) and logits.isfinite().all()


def test_pruned_experts_are_the_dense_model_s_best_ranked_rows(dense: Path, tmp_path: Path) -> None:
    pruned = _write(tmp_path / "pruned", "16:0.6,0:0.4")
    found = verify(pruned, dense)
    quantization = Checkpoint.open(pruned).quantization
    assert quantization is not None
    for layer in range(2):
        wanted = layer_counts(SMALL, TierPlan.prune(0.4), seed=5 + layer, align=8)
        assert quantization.layout(f"model.layers.{layer}.mlp") == wanted
        energies = layer_energies(SMALL, seed=5 + layer).experts
        for expert, width in enumerate(wanted.expert_d_ff):
            gone = set(energies[expert].argsort(descending=True)[width:].tolist())
            assert set(found.layers[layer].experts[expert]) == gone


def test_packed_tiers_have_plausible_weights(tmp_path: Path) -> None:
    packed = Checkpoint.open(_write(tmp_path / "packed", "16:0.1,3:0.3,2:0.4,1:0.2"))
    weights = [_weights(tier).float() for tier in read_experts(packed, 1).tiers]
    assert len(weights) == 4
    for rows in weights:
        # Equally likely codes with the standard deviation of the dense weights, around 0.
        assert float(rows.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(rows.mean())) < 0.002


def _weights(tier: RaggedTier[Rows]) -> torch.Tensor:
    return dense_rows(tier.up, slice(None), torch.float32)


def test_experts_with_more_energy_see_more_tokens_unless_balanced(
    dense: Path, tmp_path: Path
) -> None:
    x = torch.randn(20000, 128)
    wanted = layer_energies(SMALL, seed=5).tokens.double()
    correlations = []
    for path in (dense, _write(tmp_path / "balanced", balanced=True)):
        router = Checkpoint.open(path).get("model.layers.0.mlp.gate.weight").float()
        chosen = (x @ router.T).topk(SMALL.top_k).indices
        seen = torch.bincount(chosen.flatten(), minlength=32).double()
        correlations.append(float(torch.corrcoef(torch.stack([wanted, seen]))[0, 1]))
    # 128 weights a row: their own norms vary by 6%, which blurs the shares.
    assert correlations[0] > 0.9 and abs(correlations[1]) < 0.5


def test_the_tokenizer_covers_the_vocabulary(dense: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert len(tokenizer) == VOCAB
    texts = tokenizer.batch_decode([[i] for i in range(VOCAB)])
    assert all(texts)
    text = "def f(x):\n    return x + 1  # größer\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_existing_folder_is_refused(dense: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        _write(dense)


def test_what_others_began_beside_the_output_is_refused_and_untouched(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "begun")
    workspace.create()
    workspace.record({"torch": "2"})
    (tmp_path / "foreign.partial").mkdir()
    (tmp_path / "foreign.partial" / "mine").write_text("keep")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match="holds an interrupted run of compress: continue it"):
        _write(tmp_path / "begun")
    with pytest.raises(OutputError, match="was not begun by camera-serve: move it away"):
        _write(tmp_path / "foreign")
    with (
        sole_writer(tmp_path / "busy", "compress"),
        pytest.raises(OutputError, match="is being written by camera-serve compress"),
    ):
        _write(tmp_path / "busy")
    assert digest(tmp_path) == before


def test_others_are_told_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(folder: Path, files: object, total: int) -> None:
        with sole_writer(tmp_path / "out", "compress"):
            pass

    monkeypatch.setattr(random_model, "write_index", meanwhile)
    with pytest.raises(OutputError, match=r"is being written by camera-serve bench\.shapes \(pid"):
        _write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_no_obstacle(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        monkeypatch.setattr(random_model, "write_index", lambda *given: os._exit(9))
        _write(tmp_path / "out")

    child = in_child(killed)
    child.join()
    assert child.exitcode == 9 and (tmp_path / "out.partial").exists()
    assert digest(_write(tmp_path / "out")) == digest(dense)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
