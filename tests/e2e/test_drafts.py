"""Speculative decoding: the same tokens, whoever guesses them, and guesses as good as they were."""

from typing import Any

import pytest
from camera_serve.converters.dense import convert_to_dense
from transformers import AutoTokenizer

from bench.reference import HELDOUT, MODEL
from tests import drafts, pruning, quantized, tiny_models
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e

ALONE, OWN_LAYER, STOCK = "alone", "its own layer guesses", "stock vLLM, the same weights"
ORIGINAL, GUESSED = "the original alone", "its compressed copy guesses"
MTP: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}

Served = dict[str, Result]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A DeepSeek-V3 with a draft layer, and the reference MoE with a draft model, in one process.

    In float32, so that a batch of guesses rounds near-ties as one token does.
    """
    folder = tmp_path_factory.mktemp("drafts")
    dense = tiny_models.save("deepseek_v3", folder / "dense")
    drafts.add_deepseek_mtp(dense)
    quantized.compress(dense, folder / "packed", "16:0.3,3:0.2,2:0.3,0:0.2")
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
    }
    return dict(zip(jobs, run(list(jobs.values()), folder), strict=True))


def _tokens(result: Result) -> list[list[int]]:
    return [answer.tokens for answer in result.answers]


def test_a_models_own_draft_layer_changes_no_token(served: Served) -> None:
    assert _tokens(served[OWN_LAYER]) == _tokens(served[ALONE])


def test_a_draft_layer_guesses_as_it_does_in_stock_vllm(served: Served) -> None:
    found, wanted = served[OWN_LAYER], served[STOCK]
    assert found.accepted > 2
    assert (found.drafts, found.accepted) == (wanted.drafts, wanted.accepted)
    assert _tokens(found) == _tokens(wanted)


def test_a_compressed_draft_model_changes_no_token(served: Served) -> None:
    assert _tokens(served[GUESSED]) == _tokens(served[ORIGINAL])


def test_a_compressed_draft_model_guesses_well(served: Served) -> None:
    found = served[GUESSED]
    assert found.drafts > 16
    assert found.accepted > 0.5 * found.drafted
