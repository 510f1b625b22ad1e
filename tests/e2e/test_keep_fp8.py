"""Layers that stayed in FP8, in an engine: the answers of the same model in 16 bits."""

import pytest

from tests.e2e.engine import Job, Result, run
from tests.keep_fp8 import outputs
from tests.originals import FP8_BLOCKS, Published, fp8

pytestmark = pytest.mark.e2e

SMALL_BLOCKS = Published(fp8((32, 32)), FP8_BLOCKS.config | {"weight_block_size": [32, 32]})
"""The matrices that vLLM puts in one layer end with a whole block, as in published models."""

TOLERANCE = 0.1
"""Of log-probabilities in bfloat16: the same weights, another order of sums."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    folder = tmp_path_factory.mktemp("keep_fp8")
    jobs = {}
    for family in ("qwen3_moe", "deepseek_v3"):
        (folder / family).mkdir()
        kept, decoded = outputs(family, folder / family, SMALL_BLOCKS)
        jobs[family, "kept"] = Job(str(kept), {"dtype": "bfloat16"})
        jobs[family, "decoded"] = Job(str(decoded), {"dtype": "bfloat16"})
    results = run(list(jobs.values()), folder, module="tests.e2e.fp8_engine")
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_layers_in_fp8_answer_as_in_16_bits(
    served: dict[tuple[str, str], Result], family: str
) -> None:
    found, wanted = served[family, "kept"], served[family, "decoded"]
    assert found.expert_bytes == wanted.expert_bytes
    for ours, theirs in zip(found.answers, wanted.answers, strict=True):
        # Of the first token: a near tie may lead elsewhere from there on.
        first, other = ours.top[0], theirs.top[0]
        both = first.keys() & other.keys()
        assert len(both) >= 4
        assert max(abs(first[token] - other[token]) for token in both) < TOLERANCE
