"""Every family in vLLM answers as transformers running the original model with zeroed rows."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import pruning, quantized, tiny_models
from tests.e2e import checkpoints
from tests.e2e.checkpoints import NOT_ON_CPU
from tests.e2e.engine import Job, Result, run

pytestmark = pytest.mark.e2e


def _shared(width: int, expert: int, d_ff: int) -> int:
    return width if expert < 0 else pruning.hostile(expert, d_ff)


VARIANTS: dict[str, tuple[str, pruning.Widths]] = {
    **{family: (family, pruning.hostile) for family in checkpoints.SERVED},
    "shared expert of width 0": ("qwen2_moe", partial(_shared, 0)),
    "shared experts of width 1": ("deepseek", partial(_shared, 1)),
    "no routed expert left": ("qwen2_moe", lambda expert, d_ff: 5 if expert < 0 else 0),
}
QUANTIZED = {
    **{f"{family}, 2 bits": (family, "3:0.2,2:0.6,1:0.2") for family in checkpoints.SERVED},
    "all bits": ("qwen2_moe", "16:0.1,8:0.1,4:0.2,3:0.1,2:0.2,1:0.1,0:0.2"),
}
DUMMY = "dummy"
QUANTIZED_DUMMY = "dummy, 2 bits"
WIDE = "d_model 1024, groups of 128, in bfloat16"
HYBRID = "linear attention, in bfloat16"

Served = dict[str, tuple[Result, Path, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Hybrid:
    return checkpoints.make_hybrid("qwen3_5_moe", tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, hybrid: checkpoints.Hybrid) -> Served:
    """All variants, dummy loads and a wider model, one after another in one process."""
    folder = tmp_path_factory.mktemp("families")
    made = {
        variant: checkpoints.make(family, folder / str(number), widths)
        for number, (variant, (family, widths)) in enumerate(VARIANTS.items())
    }
    made |= {
        variant: checkpoints.make_quantized(family, folder / variant, plan)
        for variant, (family, plan) in QUANTIZED.items()
    }
    families = {variant: family for variant, (family, _) in (VARIANTS | QUANTIZED).items()}
    jobs = [
        Job(str(path), checkpoints.ARGUMENTS.get(families[variant], {}))
        for variant, (path, _) in made.items()
    ]
    dummies = {DUMMY: made["qwen2_moe"][0], QUANTIZED_DUMMY: made["qwen2_moe, 2 bits"][0]}
    for name, path in dummies.items():
        bare = folder / name
        shutil.copytree(path, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
        jobs.append(Job(str(bare), {"load_format": "dummy"}))
    jobs.append(Job(str(_wide(folder)), {"dtype": "bfloat16"}))
    refused = _refused(folder)
    jobs += refused
    seeing = checkpoints.ARGUMENTS["qwen3_5_moe"]
    jobs.append(Job(str(hybrid.path), seeing | checkpoints.HYBRID))
    results = run(jobs, folder)
    served = {
        variant: (result, path, checkpoints.expected(model))
        for (variant, (path, model)), result in zip(made.items(), results, strict=False)
    }
    wide = (WIDE, Path(jobs[len(made) + len(dummies)].model))
    others = [*dummies.items(), wide, *((job.model, Path(job.model)) for job in refused)]
    others.append((HYBRID, hybrid.path))
    rest = zip(others, results[len(made) :], strict=True)
    return served | {name: (result, path, []) for (name, path), result in rest}


def _refused(folder: Path) -> list[Job]:
    """What `NOT_ON_CPU` lists: the dense model, a pruned one and a quantized one of each."""
    paths = []
    for family in NOT_ON_CPU:
        pruned, _ = checkpoints.make(family, folder / family)
        packed, _ = checkpoints.make_quantized(family, folder / f"{family}-2", "3:0.5,1:0.5")
        paths += [pruned.with_name("dense"), pruned, packed]
    return [Job(str(path), refused=True) for path in paths]


def _wide(folder: Path) -> Path:
    dense = tiny_models.save(
        "qwen2_moe",
        folder / "wide" / "dense",
        hidden_size=1024,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=512,
        num_attention_heads=8,
        num_hidden_layers=1,
    )
    output = folder / "wide" / "quantized"
    quantized.compress(dense, output, "3:0.2,2:0.6,1:0.2", align=32, group_size=128)
    return output


@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTIZED])
def test_served_equals_the_original_with_the_same_weights(served: Served, variant: str) -> None:
    result, _, wanted = served[variant]
    assert checkpoints.difference(result.answers, wanted) < checkpoints.TOLERANCE


def _experts(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of every routed and shared expert on disk."""
    structure = pruning.structure_of(folder)
    stored = (load_file(file) for file in folder.glob("*.safetensors"))
    every = {name: tensor for tensors in stored for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in every.items() if structure.is_expert(name)}


@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTIZED, DUMMY, QUANTIZED_DUMMY])
def test_resident_experts_take_the_bytes_of_the_kept_rows(served: Served, variant: str) -> None:
    result, path, _ = served[variant]
    stored = _experts(path)
    if not any(name.endswith(".qweight") for name in stored):
        # Shared experts without packed rows are ordinary layers of vLLM's.
        stored = {name: t for name, t in stored.items() if ".experts." in name}
    # 16-bit rows are served in float32 here; packed ones take the bytes they have on disk.
    wanted = sum(
        t.numel() * 4 if name.endswith(".weight") else t.nbytes for name, t in stored.items()
    )
    assert result.expert_bytes == wanted


def test_two_bits_cost_at_most_a_sixth_and_a_half_of_bfloat16(served: Served) -> None:
    result, path, _ = served[WIDE]
    dense, packed = _experts(path.with_name("dense")), _experts(path)
    assert {t.dtype for t in dense.values()} == {torch.bfloat16}
    before = sum(t.nbytes for t in dense.values())
    # Scales and zeros included: 2 bits on average and 2 * 16 bits for 128 weights, 1/7.1 of 16.
    assert sum(t.nbytes for t in packed.values()) * 6.5 <= before
    assert result.expert_bytes * 6.5 <= before


@pytest.mark.parametrize("name", [DUMMY, QUANTIZED_DUMMY])
def test_dummy_loading_needs_no_weights(served: Served, name: str) -> None:
    result, _, _ = served[name]
    assert all(len(answer.tokens) == 8 for answer in result.answers)


def test_linear_attention_gives_the_original_with_the_same_weights(
    served: Served, hybrid: checkpoints.Hybrid
) -> None:
    result, _, _ = served[HYBRID]
    hybrid.check(result.answers)


@pytest.mark.parametrize("family", NOT_ON_CPU)
def test_what_vllm_cannot_run_on_a_cpu_is_loaded_and_ends_as_its_dense_model_does(
    served: Served, family: str
) -> None:
    ends = {
        result.error for result, path, _ in served.values() if path.parts[-2].startswith(family)
    }
    assert len(ends) == 1 and ends.pop().startswith(NOT_ON_CPU[family])
