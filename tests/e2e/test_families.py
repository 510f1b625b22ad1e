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
QUANTIZED = {
    **{f"{family}, 2 bits": (family, "3:0.2,2:0.6,1:0.2") for family in tiny_models.FAMILIES},
    "all bits": ("qwen2_moe", "16:0.1,8:0.1,4:0.2,3:0.1,2:0.2,1:0.1,0:0.2"),
}
DUMMY = "dummy"
QUANTIZED_DUMMY = "dummy, 2 bits"

Served = dict[str, tuple[Result, Path, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """All variants and a dummy load of the first, one after another in one process."""
    folder = tmp_path_factory.mktemp("families")
    made = {
        variant: checkpoints.make(family, folder / str(number), widths)
        for number, (variant, (family, widths)) in enumerate(VARIANTS.items())
    }
    made |= {
        variant: checkpoints.make_quantized(family, folder / variant, plan)
        for variant, (family, plan) in QUANTIZED.items()
    }
    jobs = [Job(str(path)) for path, _ in made.values()]
    dummies = {DUMMY: made["qwen2_moe"][0], QUANTIZED_DUMMY: made["qwen2_moe, 2 bits"][0]}
    for name, path in dummies.items():
        bare = folder / name
        shutil.copytree(path, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
        jobs.append(Job(str(bare), {"load_format": "dummy"}))
    results = run(jobs, folder)
    served = {
        variant: (result, path, checkpoints.expected(model))
        for (variant, (path, model)), result in zip(made.items(), results, strict=False)
    }
    empty = zip(dummies.items(), results[len(made) :], strict=True)
    return served | {name: (result, path, []) for (name, path), result in empty}


@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTIZED])
def test_served_equals_the_original_with_the_same_weights(served: Served, variant: str) -> None:
    result, _, wanted = served[variant]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE


@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTIZED, DUMMY, QUANTIZED_DUMMY])
def test_resident_experts_take_the_bytes_of_the_kept_rows(served: Served, variant: str) -> None:
    result, path, _ = served[variant]
    stored = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    # 16-bit rows are served in float32 here; packed ones take the bytes they have on disk.
    wanted = sum(
        t.numel() * 4 if name.endswith(".weight") else t.nbytes
        for name, t in stored.items()
        if ".experts." in name
    )
    assert result.expert_bytes == wanted


@pytest.mark.parametrize("name", [DUMMY, QUANTIZED_DUMMY])
def test_dummy_loading_needs_no_weights(served: Served, name: str) -> None:
    result, _, _ = served[name]
    assert all(len(answer.tokens) == 8 for answer in result.answers)
