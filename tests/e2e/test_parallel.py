"""Tensor, expert and pipeline parallelism give the answers of the whole model on one process."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.e2e import checkpoints
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e

# With and without shared experts. Kept widths are odd, so ranks hold different numbers of rows.
FAMILIES = ("qwen2_moe", "qwen3_moe")
MODES: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    # vLLM's CPU backend runs pipelines compiled only.
    "pipeline": {"pipeline_parallel_size": 2, "enforce_eager": False},
}
CASES = tuple(product(FAMILIES, MODES))

Served = dict[tuple[str, str], tuple[Result, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("parallel")
    made = {family: checkpoints.make(family, folder / family) for family in FAMILIES}
    wanted = {family: checkpoints.expected(model) for family, (_, model) in made.items()}
    jobs = [Job(str(made[family][0]), MODES[mode]) for family, mode in CASES]
    results = run(jobs, folder, VLLM_CPU_OMP_THREADS_BIND="0|1")
    return {
        (family, mode): (result, wanted[family])
        for (family, mode), result in zip(CASES, results, strict=True)
    }


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_two_ranks_answer_as_one(served: Served, family: str, mode: str) -> None:
    result, wanted = served[family, mode]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE
