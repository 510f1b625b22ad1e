"""The C++ kernel's threads, in processes of their own, where nothing else has started any."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, torch
from camera_serve.ragged.layer import RaggedLayer, RaggedTier
from camera_serve.kernels.cpu import pack_layer, ragged_moe
torch.set_num_threads(int(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
rows = [torch.zeros(128, 64, dtype=torch.bfloat16) for _ in range(3)]
layer = pack_layer(RaggedLayer((RaggedTier(*rows, (0, 64, 128)),)))
x = torch.zeros(64, 64, dtype=torch.bfloat16)
ids = torch.tensor([[0, 1]] * 64)
weights = torch.ones(64, 2)
ragged_moe(x, weights, ids, layer)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_they_are_as_many_as_torch_may_take(threads: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(threads - 1), done.stderr
