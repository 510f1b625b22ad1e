"""Tensor, expert and pipeline parallelism give the answers of the whole model on one process."""

from typing import Any

import pytest
import torch

from tests.e2e import checkpoints
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
EXPERT = {**TENSOR, "enable_expert_parallel": True}
# vLLM's CPU backend runs pipelines compiled only.
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}

# With and without shared experts. Kept widths are odd, so ranks hold different numbers of rows.
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_moe", "tensor"): TENSOR,
    ("qwen2_moe", "expert"): EXPERT,
    ("qwen2_moe", "pipeline"): PIPELINE,
    ("qwen3_moe", "tensor"): TENSOR,
    ("qwen3_moe", "expert"): EXPERT,
}

Served = dict[tuple[str, str], tuple[Result, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("parallel")
    families = dict.fromkeys(family for family, _ in CASES)
    made = {family: checkpoints.make(family, folder / family) for family in families}
    wanted = {family: checkpoints.expected(model) for family, (_, model) in made.items()}
    jobs = [Job(str(made[family][0]), arguments) for (family, _), arguments in CASES.items()]
    results = run(jobs, folder, VLLM_CPU_OMP_THREADS_BIND="0|1")
    return {
        (family, mode): (result, wanted[family])
        for (family, mode), result in zip(CASES, results, strict=True)
    }


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_two_ranks_answer_as_one(served: Served, family: str, mode: str) -> None:
    result, wanted = served[family, mode]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE
