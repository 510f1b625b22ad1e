"""Speculative decoding: the same tokens, whoever guesses them, and guesses as good as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from camera_serve.converters.dense import convert_to_dense
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bench.reference import HELDOUT, MODEL
from tests import drafts, pruning, quantized, tiny_models
from tests.e2e import checkpoints
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e

ALONE, OWN_LAYER, STOCK = "alone", "its own layer guesses", "stock vLLM, the same weights"
ORIGINAL, GUESSED = "the original alone", "its compressed copy guesses"
PLAN = "16:0.3,3:0.2,2:0.3,0:0.2"
MTP: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}

# A layer past the last one that shares the head, one beside a nested model, and two that are dense.
FORMS = ("hy_v3", "qwen3_5_moe", "ernie4_5_moe", "mimo_v2_flash")

Served = dict[str, Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drafts")


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    """A model with each form of draft layer, and the reference MoE with a draft model, one process.

    In float32, so that a batch of guesses rounds near-ties as one token does.
    """
    dense = tiny_models.save("deepseek_v3", folder / "dense")
    drafts.add_deepseek_mtp(dense)
    quantized.compress(dense, folder / "packed", PLAN)
    convert_to_dense(folder / "packed", folder / "converted")
    pruning.prune(MODEL, folder / "pruned", lambda expert, d_ff: d_ff - 8)
    guessing = {"method": "draft_model", "num_speculative_tokens": 3}
    guessing["model"] = str(folder / "pruned")
    lines = HELDOUT["code, in domain"].read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer.encode(line) for line in lines if 20 < len(line) < 80][:160:10]
    jobs = {
        ALONE: Job(str(folder / "packed")),
        OWN_LAYER: Job(str(folder / "packed"), {"speculative_config": MTP}),
        STOCK: Job(str(folder / "converted"), {"speculative_config": MTP}),
        ORIGINAL: Job(str(MODEL), prompts=prompts),
        GUESSED: Job(str(MODEL), {"speculative_config": guessing}, prompts),
        **{family: _drafting(family, folder / family) for family in FORMS},
    }
    return dict(zip(jobs, run(list(jobs.values()), folder), strict=True))


def _drafting(family: str, folder: Path) -> Job:
    """A compressed model whose own layer of its family's form guesses."""
    dense = checkpoints.dense(family, folder)
    drafts.add_mtp(family, dense)
    quantized.compress(dense, folder / "packed", PLAN)
    arguments = checkpoints.ARGUMENTS.get(family, {}) | {"speculative_config": MTP}
    return Job(str(folder / "packed"), arguments)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _tokens(result: Result) -> list[list[int]]:
    return [answer.tokens for answer in result.answers]


def test_a_models_own_draft_layer_changes_no_token(served: Served) -> None:
    assert _tokens(served[OWN_LAYER]) == _tokens(served[ALONE])


def test_a_draft_layer_guesses_as_it_does_in_stock_vllm(served: Served) -> None:
    found, wanted = served[OWN_LAYER], served[STOCK]
    assert found.accepted > 2
    assert (found.drafts, found.accepted) == (wanted.drafts, wanted.accepted)
    assert _tokens(found) == _tokens(wanted)


@pytest.mark.parametrize("family", FORMS)
def test_a_draft_layer_of_any_form_comes_along_and_guesses(
    served: Served, folder: Path, family: str
) -> None:
    result, dense, packed = served[family], folder / family / "dense", folder / family / "packed"
    before, after = _stored(dense), _stored(packed)
    layer = drafts.layer_of(family)
    carried = {name: tensor for name, tensor in before.items() if name.startswith(layer)}
    assert carried and all(torch.equal(tensor, after[name]) for name, tensor in carried.items())
    wanted = checkpoints.expected(quantized.dequantized(dense, packed))
    assert _tokens(result) == [rows.argmax(-1).tolist() for rows in wanted]
    # An MLP of other weights, or behind another norm, guesses a tenth to a sixth.
    assert result.accepted > 0.25 * result.drafted


def test_a_compressed_draft_model_changes_no_token(served: Served) -> None:
    assert _tokens(served[GUESSED]) == _tokens(served[ORIGINAL])


def test_a_compressed_draft_model_guesses_well(served: Served) -> None:
    found = served[GUESSED]
    assert found.drafts > 16
    assert found.accepted > 0.5 * found.drafted
