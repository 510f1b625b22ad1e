"""Every family in vLLM answers as transformers running the original model with zeroed rows."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import pruning, tiny_models
from tests.e2e import checkpoints
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e


def _shared(width: int, expert: int, d_ff: int) -> int:
    return width if expert < 0 else pruning.hostile(expert, d_ff)


VARIANTS: dict[str, tuple[str, pruning.Widths]] = {
    **{family: (family, pruning.hostile) for family in tiny_models.FAMILIES},
    "shared expert of width 0": ("qwen2_moe", partial(_shared, 0)),
    "shared experts of width 1": ("deepseek", partial(_shared, 1)),
    "no routed expert left": ("qwen2_moe", lambda expert, d_ff: 5 if expert < 0 else 0),
}
DUMMY = "dummy"

Served = dict[str, tuple[Result, Path, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """All variants and a dummy load of the first, one after another in one process."""
    folder = tmp_path_factory.mktemp("families")
    made = {
        variant: checkpoints.make(family, folder / str(number), widths)
        for number, (variant, (family, widths)) in enumerate(VARIANTS.items())
    }
    jobs = [Job(str(path)) for path, _ in made.values()]
    bare = folder / "bare"
    shutil.copytree(jobs[0].model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    results = run([*jobs, Job(str(bare), {"load_format": "dummy"})], folder)
    served = {
        variant: (result, path, checkpoints.expected(model))
        for (variant, (path, model)), result in zip(made.items(), results, strict=False)
    }
    return served | {DUMMY: (results[-1], Path(jobs[0].model), [])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_served_equals_the_original_with_the_same_rows_zeroed(served: Served, variant: str) -> None:
    result, _, wanted = served[variant]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE


@pytest.mark.parametrize("variant", [*VARIANTS, DUMMY])
def test_resident_experts_take_the_bytes_of_the_kept_rows(served: Served, variant: str) -> None:
    result, path, _ = served[variant]
    tensors = load_file(path / "model.safetensors")
    kept = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert result.expert_bytes == kept * torch.float32.itemsize


def test_dummy_loading_needs_no_weights(served: Served) -> None:
    result, _, _ = served[DUMMY]
    assert all(len(answer.tokens) == 8 for answer in result.answers)
