import pytest
import transformers
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlavaConfig, Qwen3MoeConfig

from bench import coverage
from camera_serve.errors import TRANSFORMERS_TESTED, UnsupportedModelError
from camera_serve.models import describe
from camera_serve.models.coverage import REFUSED
from camera_serve.models.families import FAMILIES


@pytest.fixture(scope="module")
def known() -> set[str]:
    return coverage.moe_model_types()


def test_every_moe_model_type_of_transformers_is_supported_or_refused(known: set[str]) -> None:
    undecided = sorted(known - FAMILIES.keys() - REFUSED.keys())
    assert not undecided, (
        f"transformers {transformers.__version__} has MoE models nobody has decided on: support "
        f"them in camera_serve/models/families.py or refuse them in coverage.py: {undecided}"
    )


def test_nothing_is_both_and_nothing_is_refused_that_does_not_exist(known: set[str]) -> None:
    assert not REFUSED.keys() & FAMILIES.keys()
    if transformers.__version__ == TRANSFORMERS_TESTED[-1]:
        assert REFUSED.keys() <= known


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v4", "gemma4", "llama4", "jamba"])
def test_a_refused_model_is_told_why(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' .*is not supported: ") as info:
        describe(config)
    assert REFUSED[model_type] in str(info.value)


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig(), LlavaConfig()])
def test_a_dense_model_is_told_that_it_is_dense(config: transformers.PreTrainedConfig) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported: it is a dense model"):
        describe(config)


def test_a_model_around_a_moe_text_model_is_told_that_it_is_not_known() -> None:
    config = LlavaConfig(text_config=Qwen3MoeConfig())
    with pytest.raises(UnsupportedModelError, match="experts in its part of type 'qwen3_moe'"):
        describe(config)
