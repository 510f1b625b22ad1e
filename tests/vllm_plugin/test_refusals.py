"""What the plugin cannot do, it says, and names the flag."""

from collections.abc import Iterator

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from camera_serve.errors import ServingError
from camera_serve.vllm_plugin.moe import LOAD_FORMATS
from tests.vllm_plugin.experts import loaded_layer, make_layer, random_experts

EXPERTS = random_experts([(3,), (5,)])


@pytest.fixture
def engine() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.mark.parametrize(
    "load_format", ["sharded_state", "tensorizer", "runai_streamer_sharded", "pt", "npcache"]
)
def test_a_load_format_that_reads_no_single_tensors_is_refused(
    load_format: str, engine: VllmConfig
) -> None:
    engine.load_config.load_format = load_format
    with pytest.raises(ServingError, match=f"--load-format {load_format} does not .* auto"):
        make_layer(EXPERTS)


@pytest.mark.parametrize("load_format", LOAD_FORMATS)
def test_the_others_are_not(load_format: str, engine: VllmConfig) -> None:
    engine.load_config.load_format = load_format
    make_layer(EXPERTS)


def test_saving_the_state_of_a_served_model_is_refused(engine: VllmConfig) -> None:
    _, layer = loaded_layer(EXPERTS)
    model = torch.nn.Module()
    model.experts = layer
    with pytest.raises(ServingError, match=r"save_sharded_state.*the checkpoint's own folder"):
        ShardedStateLoader._filter_subtensors(model.state_dict())


def test_weights_that_come_to_a_served_model_are_refused(engine: VllmConfig) -> None:
    _, layer = loaded_layer(EXPERTS)
    with pytest.raises(ServingError, match=r"came after the model was loaded.*reload_weights"):
        EXPERTS.load(layer)
