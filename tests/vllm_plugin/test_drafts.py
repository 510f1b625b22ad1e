"""MoE layers outside the layout: served dense where they draft tokens, and have weights."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.transformers_utils.config import get_config

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin.config import CameraConfig
from camera_serve.vllm_plugin.linear import SharedDownMethod
from tests import drafts, pruning, tiny_models
from tests.editing import edit_weights
from tests.vllm_plugin.test_refusals import layer_of

DRAFT = f"{drafts.DRAFT}mlp"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = tiny_models.save("deepseek_v3", tmp_path_factory.mktemp("drafts") / "dense")
    drafts.add_deepseek_mtp(dense)
    pruning.prune(dense, dense.with_name("pruned"))
    return dense.with_name("pruned")


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "pruned"))


def method(
    checkpoint: Path, prefix: str, draft: Path | None = None, kind: Any = RoutedExperts
) -> Any:
    """What a layer of this name gets when `draft` guesses tokens: by default the model itself."""
    hf_config = get_config(checkpoint, trust_remote_code=False)
    config = CameraConfig.from_config(hf_config.quantization_config)
    config.maybe_update_config(str(checkpoint), hf_config=hf_config, revision=None)
    engine = VllmConfig()
    engine.model_config = SimpleNamespace(
        quantization_config=None, dtype=None, model=str(checkpoint)
    )
    drafting = SimpleNamespace(model=str(draft or checkpoint))
    engine.speculative_config = SimpleNamespace(draft_model_config=drafting)
    with set_current_vllm_config(engine):
        return config.get_quant_method(layer_of(kind), prefix)


def refusal(*arguments: Any) -> str:
    with pytest.raises(ServingError) as caught:
        method(*arguments)
    return str(caught.value)


def test_a_draft_layer_is_vllms_own(checkpoint: Path) -> None:
    assert method(checkpoint, f"{DRAFT}.experts") is None
    shared = method(checkpoint, f"{DRAFT}.shared_experts.down_proj", kind=ReplicatedLinear)
    assert type(shared) is UnquantizedLinearMethod


def test_below_mtp_layers_count_from_the_first_again(tmp_path: Path) -> None:
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense")
    drafts.add_qwen_mtp(dense)
    pruning.prune(dense, tmp_path / "pruned")
    assert method(tmp_path / "pruned", "mtp.layers.0.mlp.experts") is None
    assert "'mtp.layers.1.mlp'" in refusal(tmp_path / "pruned", "mtp.layers.1.mlp.experts")


def test_a_draft_layer_without_weights_is_refused(checkpoint: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{DRAFT}.experts.")]:
            del tensors[name]

    edit_weights(checkpoint, drop)
    message = refusal(checkpoint, f"{DRAFT}.experts")
    assert message.startswith(f"vLLM builds a MoE layer {DRAFT!r}, which quantization_config does")
    assert "no weights for it. Start without --speculative-config" in message


def test_weights_of_a_draft_layer_may_lie_in_another_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert method(checkpoint, "model.layers.9.mlp.experts", draft=tmp_path / "eagle") is None
    for prefix in ("model.layers.0.mlp", "layers.1.mlp", "model.layers.1.block_sparse_moe"):
        message = refusal(checkpoint, f"{prefix}.experts", tmp_path / "eagle")
        assert f"MoE layer {prefix!r}, which quantization_config does not list" in message
        assert "--model-impl" in message


def test_dummy_loading_drafts_as_well(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert method(checkpoint, f"{DRAFT}.experts") is None


def test_a_compressed_model_drafts_for_another_one(checkpoint: Path, tmp_path: Path) -> None:
    prefix = "draft_model.model.layers.1.mlp"
    shared = method(checkpoint, f"{prefix}.shared_experts.down_proj", kind=RowParallelLinear)
    assert isinstance(shared, SharedDownMethod)
    message = refusal(checkpoint, "draft_model.model.layers.0.mlp.experts")
    assert "MoE layer 'model.layers.0.mlp', which" in message
