from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from camera_serve.streaming import ModelStream
from tests import tiny_models


def stream_all(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    hidden = stream.embed(tokens)
    for layer in range(stream.structure.num_layers):
        loaded = stream.load(layer)
        if loaded.experts is not None:
            loaded.use_experts(loaded.experts)
        hidden = stream.run(layer, loaded, hidden)
    return hidden


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_streaming_gives_what_the_whole_model_gives(family: str, tmp_path: Path) -> None:
    path = tiny_models.save(family, tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (3, 40))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        wanted = model.model(tokens, use_cache=False).last_hidden_state
    # float32 sums in another order, through two or three layers.
    torch.testing.assert_close(stream_all(path, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_layer_keeps_its_mask(tmp_path: Path) -> None:
    path = tiny_models.save(
        "qwen2_moe",
        tmp_path,
        dtype=torch.float32,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 24))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        wanted = model.model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(stream_all(path, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (5, 16))
    whole = stream_all(path, tokens)
    monkeypatch.setattr("camera_serve.streaming.TOKENS_PER_BATCH", 32)
    torch.testing.assert_close(stream_all(path, tokens), whole, rtol=1e-5, atol=1e-5)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_models.save("qwen3_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.mlp\.experts\.3\.up_proj.* 1 NaN or Inf"
    ):
        stream.load(2)
