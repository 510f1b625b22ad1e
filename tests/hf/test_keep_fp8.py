"""Weights that stayed in FP8, in transformers: the same model as from their 16-bit copies."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import camera_serve.hf  # noqa: F401
from tests.keep_fp8 import PER_TENSOR, outputs
from tests.originals import FP8_BLOCKS, Published

PROMPT = torch.tensor([[42, 71, 78, 78, 81, 9, 200, 31, 5, 310, 11, 63]])


@pytest.mark.parametrize("way", [FP8_BLOCKS, PER_TENSOR], ids=["blocks", "per tensor"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_decoded_while_they_are_loaded(
    family: str, way: Published, dtype: torch.dtype, tmp_path: Path
) -> None:
    kept, decoded = outputs(family, tmp_path, way)
    for kind in (AutoModelForCausalLM, AutoModel):
        found, wanted = (kind.from_pretrained(path, dtype=dtype) for path in (kept, decoded))
        weights = dict(wanted.named_parameters())
        assert weights.keys() == dict(found.named_parameters()).keys()
        for name, weight in found.named_parameters():
            assert weight.equal(weights[name]), name
    found, wanted = (AutoModelForCausalLM.from_pretrained(p, dtype=dtype) for p in (kept, decoded))
    with torch.no_grad():
        assert found(PROMPT).logits.equal(wanted(PROMPT).logits)
