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
PRUNED = ("qwen2_moe", "qwen3_moe")
PACKED = "qwen2_moe, all bits"
PLAN = "16:0.1,8:0.1,4:0.2,3:0.1,2:0.2,1:0.1,0:0.2"
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_moe", "tensor"): TENSOR,
    ("qwen2_moe", "expert"): EXPERT,
    ("qwen2_moe", "pipeline"): PIPELINE,
    ("qwen3_moe", "tensor"): TENSOR,
    ("qwen3_moe", "expert"): EXPERT,
    (PACKED, "tensor"): TENSOR,
    (PACKED, "expert"): EXPERT,
}

Served = dict[tuple[str, str], tuple[Result, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("parallel")
    made = {family: checkpoints.make(family, folder / family) for family in PRUNED}
    made[PACKED] = checkpoints.make_quantized("qwen2_moe", folder / PACKED, PLAN)
    wanted = {variant: checkpoints.expected(model) for variant, (_, model) in made.items()}
    jobs = [Job(str(made[variant][0]), arguments) for (variant, _), arguments in CASES.items()]
    results = run(jobs, folder, VLLM_CPU_OMP_THREADS_BIND="0|1")
    return {
        (variant, mode): (result, wanted[variant])
        for (variant, mode), result in zip(CASES, results, strict=True)
    }


@pytest.mark.parametrize(("variant", "mode"), CASES)
def test_two_ranks_answer_as_one(served: Served, variant: str, mode: str) -> None:
    result, wanted = served[variant, mode]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE
