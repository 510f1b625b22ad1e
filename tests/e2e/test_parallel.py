"""Tensor, expert and pipeline parallelism give the answers of the whole model on one process."""

from pathlib import Path
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

# With and without shared experts, and the text part of a model that sees pictures. Kept widths are
# odd, so ranks hold different numbers of rows.
PRUNED = ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe")
HYBRID = "qwen3_next, in bfloat16"
PACKED = "qwen2_moe, all bits"
PLAN = "16:0.1,8:0.1,4:0.2,3:0.1,2:0.2,1:0.1,0:0.2"
Cases = dict[tuple[str, str], dict[str, Any]]
# vLLM starts two workers for each of these engines, and every worker imports vLLM anew.
WORKERS: Cases = {("qwen2_moe", "pipeline"): PIPELINE, (PACKED, "tensor"): TENSOR}
# Here the two ranks are processes of ours, and serve one model after another.
RANKS: Cases = {
    ("qwen2_moe", "tensor"): TENSOR,
    ("qwen2_moe", "expert"): EXPERT,
    ("qwen3_moe", "tensor"): TENSOR,
    ("qwen3_moe", "expert"): EXPERT,
    (PACKED, "expert"): EXPERT,
    ("qwen3_vl_moe", "tensor"): TENSOR,
    (HYBRID, "tensor"): TENSOR | checkpoints.HYBRID,
}
CASES = {**WORKERS, **RANKS}

Made = dict[str, tuple[Path, torch.nn.Module]]
Served = dict[tuple[str, str], tuple[Result, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Hybrid:
    return checkpoints.make_hybrid("qwen3_next", tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, hybrid: checkpoints.Hybrid) -> Served:
    folder = tmp_path_factory.mktemp("parallel")
    made: Made = {family: checkpoints.make(family, folder / family) for family in PRUNED}
    made[HYBRID] = hybrid.path, hybrid.zeroed
    made[PACKED] = checkpoints.make_quantized("qwen2_moe", folder / PACKED, PLAN)
    wanted = {variant: checkpoints.expected(model) for variant, (_, model) in made.items()}
    results = [*_run(WORKERS, made, folder, ranks=1), *_run(RANKS, made, folder, ranks=2)]
    return {
        (variant, mode): (result, wanted[variant])
        for (variant, mode), result in zip(CASES, results, strict=True)
    }


def _run(cases: Cases, made: Made, folder: Path, ranks: int) -> list[Result]:
    launched = {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}
    jobs = [
        Job(str(made[v][0]), {**checkpoints.ARGUMENTS.get(v, {}), **arguments, **launched})
        for (v, _), arguments in cases.items()
    ]
    return run(jobs, folder, ranks, VLLM_CPU_OMP_THREADS_BIND="0|1")


@pytest.mark.parametrize(("variant", "mode"), [case for case in CASES if case[0] != HYBRID])
def test_two_ranks_answer_as_one(served: Served, variant: str, mode: str) -> None:
    result, wanted = served[variant, mode]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE


def test_two_ranks_share_linear_attention(served: Served, hybrid: checkpoints.Hybrid) -> None:
    result, _ = served[HYBRID, "tensor"]
    hybrid.check(result.answers)
