"""`tests.e2e.engine` with a plain-torch product in the place of vLLM's FP8 kernels.

vLLM has none for blocks on a CPU without AMX. Everything around it is vLLM's: which layers get the
method, what they allocate, and how weights and scales are loaded into layers that are several of
the checkpoint's.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import fp8

from tests.e2e import engine
from tests.originals import expand


class PlainProduct:
    """What `init_fp8_linear_kernel` gives: called with a layer that holds codes and scales."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing is repacked."""

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        codes, block = layer.weight, tuple(layer.weight_block_size)
        scales = expand(layer.weight_scale_inv, block, codes.shape)
        return torch.nn.functional.linear(x, (codes.float() * scales).to(x.dtype), bias)


if __name__ == "__main__":
    fp8.init_fp8_linear_kernel = lambda **_: PlainProduct()
    engine._main(Path(sys.argv[1]))
