"""A person is told where stock vLLM computes a model otherwise than transformers, only there."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from camera_serve.models.registration import register_configs
from camera_serve.vllm_plugin.faults import warn_of_faults
from tests import pruning, tiny_models
from tests.editing import Tensors, edit_weights
from tests.vllm_plugin.test_config import open_as_vllm_does

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def warnings(path: Path, caplog: pytest.LogCaptureFixture, *, on_cpu: bool = True) -> list[str]:
    register_configs()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_faults(AutoConfig.from_pretrained(path), path, on_cpu=on_cpu)
    return [record.getMessage() for record in caplog.records]


def fill_biases(path: Path, value: float) -> None:
    def fill(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("e_score_correction_bias", "lm_head.bias")):
                tensors[name] = torch.full_like(tensor, value)

    edit_weights(path, fill)


@pytest.mark.parametrize(
    ("family", "what", "on_a_gpu_too"),
    [
        ("ernie4_5_moe", "wrongly on a CPU, .* biases of softmax scores out; a GPU is not", False),
        ("laguna", "drops the biases of the router; transformers is not affected", True),
        ("phimoe", "does not add the bias of the head", True),
    ],
)
def test_biases_that_vllm_leaves_out_are_told_where_they_are_not_zero(
    family: str, what: str, on_a_gpu_too: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_models.save(family, tmp_path)
    fill_biases(path, 0.0)
    assert not warnings(path, caplog)
    fill_biases(path, 0.5)
    (found,) = warnings(path, caplog)
    assert re.search(what, found)
    assert bool(warnings(path, caplog, on_cpu=False)) == on_a_gpu_too


@pytest.mark.parametrize(
    ("family", "good", "bad"),
    [
        ("lfm2_moe", {}, {"num_attention_heads": 2, "num_key_value_heads": 2}),
        ("glm4_moe_lite", {"rope_parameters": YARN}, {"rope_parameters": PLAIN}),
        ("deepseek_v3", {"rope_parameters": YARN}, {"rope_parameters": PLAIN}),
    ],
)
def test_rotations_that_vllms_cpu_gets_wrong_are_told(
    family: str,
    good: dict[str, Any],
    bad: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not warnings(tiny_models.save(family, tmp_path / "good", **good), caplog)
    path = tiny_models.save(family, tmp_path / "bad", **bad)
    (found,) = warnings(path, caplog)
    assert "wrongly on a CPU, compressed or not" in found
    assert not warnings(path, caplog, on_cpu=False)


def test_a_server_says_so_when_it_opens_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruning.prune(tiny_models.save("laguna", tmp_path / "dense"), tmp_path / "pruned")
    open_as_vllm_does(tmp_path / "pruned")
    assert "drops the biases of the router" in caplog.text
