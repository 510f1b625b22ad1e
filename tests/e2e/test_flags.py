"""What vLLM can do with weights beside loading them once: it works, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import checkpoints
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e

FAMILIES = ("qwen2_moe", "deepseek_v3")
PLAN = "3:0.2,2:0.6,1:0.2"
REFUSED: dict[str, dict[str, Any]] = {
    "--load-format sharded_state": {"load_format": "sharded_state"},
    "--load-format pt": {"load_format": "pt"},
    "--quantization bitsandbytes": {"quantization": "bitsandbytes"},
    "--quantization-config": {"quantization_config": {"linear": "fp8_per_tensor"}},
    "--hf-overrides": {"hf_overrides": {"num_experts": 4}},
    "--enable-lora": {"enable_lora": True},
    "--cpu-offload-gb": {"cpu_offload_gb": 0.001},
    "--offload-group-size": {"offload_group_size": 2, "offload_num_in_group": 1},
    "--moe-backend triton": {"moe_backend": "triton"},
    "--weight-transfer-config": {"weight_transfer_config": {"backend": "nccl"}},
}
SAVING = "save_sharded_state"

Served = dict[str, tuple[Result, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Served:
    """Engines that reload all their weights, and such as must not start or save, in one process."""
    folder = tmp_path_factory.mktemp("flags")
    made = {family: checkpoints.make(family, folder / family) for family in FAMILIES}
    made |= {
        f"{family}, packed": checkpoints.make_quantized(family, folder / f"{family}-packed", PLAN)
        for family in FAMILIES
    }
    jobs = {
        name: Job(str(path), calls={"reload_weights": {}}, forgotten=True)
        for name, (path, _) in made.items()
    }
    pruned, packed = str(made["qwen2_moe"][0]), str(made["qwen2_moe, packed"][0])
    jobs |= {flag: Job(pruned, arguments, refused=True) for flag, arguments in REFUSED.items()}
    jobs[SAVING] = Job(packed, calls={SAVING: {"path": str(saved)}}, refused=True)
    results = dict(zip(jobs, run(list(jobs.values()), folder), strict=True))
    wanted = {name: checkpoints.expected(model) for name, (_, model) in made.items()}
    return {name: (result, wanted.get(name, [])) for name, result in results.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["", ", packed"], ids=["16 bits", "packed"])
def test_reloaded_weights_answer_as_the_loaded_ones(served: Served, family: str, kind: str) -> None:
    result, wanted = served[f"{family}{kind}"]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_cannot_be_honoured_is_named(served: Served, flag: str) -> None:
    error = served[flag][0].error
    assert error.startswith(f"ServingError: {flag}")
    assert "start with" in error or "use one of" in error


def test_saving_is_refused_before_anything_is_written(served: Served, saved: Path) -> None:
    error = served[SAVING][0].error
    assert error.startswith("ServingError: model.layers.0.mlp.")
    assert "(save_sharded_state)" in error
    assert list(saved.iterdir()) == []
