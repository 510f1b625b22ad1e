import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.calibration import streaming
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.compression.analysis import AnalysisSettings, analyze
from camera_serve.errors import CheckpointError
from camera_serve.models.modules import layer_stack
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


@torch.no_grad()
def whole_model(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = tiny_models.load(path, dtype=torch.float32)
    stack: Any = layer_stack(model, Checkpoint.open(path).structure.modules)
    returned: list[torch.Tensor] = []
    stack.layers[-1].register_forward_hook(lambda *call: returned.append(call[-1]))
    stack(tokens, use_cache=False)
    return returned[0]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_streaming_gives_what_the_whole_model_gives(family: str, tmp_path: Path) -> None:
    path = tiny_models.save(family, tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (3, 40))
    # float32 sums in another order, through two or three layers.
    wanted = whole_model(path, tokens)
    torch.testing.assert_close(stream_all(path, tokens), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_around_the_experts_streaming_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    path = tiny_models.save(family, tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (3, 40))
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    whole: Any = layer_stack(tiny_models.load(path, dtype=torch.float32), stream.structure.modules)
    hidden = stream.embed(tokens)
    for layer in range(stream.structure.num_layers):
        loaded = stream.load(layer)
        if loaded.experts is not None:
            # Ours sum in another order: these have the family's.
            moe = whole.layers[layer].get_submodule(loaded.moe_name)
            loaded.moe.experts = moe.experts
        hidden = stream.run(layer, loaded, hidden)
    assert hidden.equal(whole_model(path, tokens))


def test_a_sliding_window_layer_keeps_its_mask(tmp_path: Path) -> None:
    path = tiny_models.save("afmoe", tmp_path, dtype=torch.float32, sliding_window=4)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 24))
    assert set(Checkpoint.open(path).config.layer_types) == {"full_attention", "sliding_attention"}
    wanted = whole_model(path, tokens)
    torch.testing.assert_close(stream_all(path, tokens), wanted, rtol=1e-4, atol=1e-4)


# Those of which transformers keeps some weights in float32, in one of the dtypes or in both.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v3", "deepseek_v32", "afmoe"])
def test_weights_have_the_bits_that_transformers_loads(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny_models.save(family, tmp_path, dtype=torch.float32)
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), dtype)
    whole: Any = layer_stack(tiny_models.load(path, dtype=dtype), stream.structure.modules)
    exact = 0
    for layer in range(stream.structure.num_layers):
        wanted = whole.layers[layer].state_dict()
        for name, weight in stream.load(layer).module.state_dict().items():
            assert weight.dtype == wanted[name].dtype, name
            assert weight.equal(wanted[name]), name
            exact += weight.dtype == torch.float32
    assert exact or (family, dtype) == ("afmoe", torch.bfloat16)


def test_batches_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (5, 16))
    whole = stream_all(path, tokens)
    monkeypatch.setattr("camera_serve.calibration.streaming.TOKENS_PER_BATCH", 32)
    torch.testing.assert_close(stream_all(path, tokens), whole, rtol=1e-5, atol=1e-5)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path)
    damage(path, "model.layers.2.mlp.experts.3.up_proj.weight")
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.mlp\.experts\.3\.up_proj.* 1 NaN or Inf"
    ):
        stream.load(2)


def damage(path: Path, name: str) -> None:
    """Make one weight NaN."""
    tensors = load_file(path / "model.safetensors")
    tensors[name][5, 7] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the next layer is read in a thread while one computes."""
    monkeypatch.setattr(streaming, "layers_at_once", lambda device: 2)


def test_layers_read_ahead_are_the_layers(read_ahead: None, tmp_path: Path) -> None:
    path = tiny_models.save("qwen2_moe", tmp_path)
    checkpoint = Checkpoint.open(path)
    stream = ModelStream(checkpoint, torch.device("cpu"), torch.bfloat16)
    layers = range(1, stream.structure.num_layers)
    with stream.loading(layers) as load:
        for layer in layers:
            # Others read and release meanwhile.
            checkpoint.get("model.norm.weight")
            checkpoint.release()
            found, wanted = list(load().tensors()), list(stream.load(layer).tensors())
            assert len(found) == len(wanted) > 3
            assert all(map(torch.equal, found, wanted))


def test_a_layer_read_while_calls_are_recorded_is_the_familys_own(tmp_path: Path) -> None:
    path = tiny_models.save("qwen2_moe", tmp_path, dtype=torch.float32)
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    read: list[StreamedLayer] = []
    stream.stack.register_forward_pre_hook(lambda *_: read.append(stream.load(1)))
    hidden = stream.embed(torch.randint(0, tiny_models.VOCAB_SIZE, (2, 16)))
    meanwhile, alone = read[0], stream.load(1)
    for loaded in (meanwhile, alone):
        assert loaded.experts is not None
        loaded.use_experts(loaded.experts)
    wanted = stream.run(1, alone, hidden.clone())
    assert stream.run(1, meanwhile, hidden.clone()).equal(wanted)


def test_compressing_with_reading_ahead_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save("qwen2_moe", tmp_path / "model")
    compress(path, tmp_path / "plain", recipe(tmp_path))
    monkeypatch.setattr(streaming, "layers_at_once", lambda device: 2)
    compress(path, tmp_path / "ahead", recipe(tmp_path))
    names = sorted(file.name for file in (tmp_path / "plain").glob("*.safetensors"))
    assert len(names) > 1
    for name in [*names, "config.json", "model.safetensors.index.json"]:
        plain, ahead = ((tmp_path / kind / name).read_bytes() for kind in ("plain", "ahead"))
        assert plain == ahead, name


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("step", ["analyze", "compress"])
def test_no_more_layers_are_in_memory_than_promised(
    step: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path / "model", num_hidden_layers=6)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts: list[int] = []
    load = ModelStream.load

    def counted(stream: ModelStream, layer: int) -> StreamedLayer:
        gc.collect()
        loaded = load(stream, layer)
        alive.add(loaded.module)
        counts.append(len(alive))
        return loaded

    monkeypatch.setattr(streaming, "layers_at_once", lambda device: at_once)
    monkeypatch.setattr(ModelStream, "load", counted)
    if step == "compress":
        compress(path, tmp_path / "out", recipe(tmp_path))
    else:
        settings = AnalysisSettings(calibration=recipe(tmp_path).calibration)
        analyze(path, tmp_path / "out", settings)
    assert len(counts) == 6 and max(counts) <= at_once


def test_damaged_weights_stop_the_layer_they_are_in(read_ahead: None, tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path / "model")
    damage(path, "model.layers.2.mlp.experts.3.up_proj.weight")
    stream = ModelStream(Checkpoint.open(path), torch.device("cpu"), torch.float32)
    with stream.loading(range(1, 3)) as load:
        load()
        with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.3\.up_proj.* 1 NaN"):
            load()


@pytest.mark.gpu
def test_a_gpu_gets_the_same_layers_while_it_computes(tmp_path: Path) -> None:
    path = tiny_models.save("qwen2_moe", tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (3, 40))
    for dtype in (torch.float32, torch.bfloat16):
        stream = ModelStream(Checkpoint.open(path), torch.device("cuda"), dtype)
        hidden, layers = stream.embed(tokens), range(stream.structure.num_layers)
        with stream.loading(layers) as load:
            for layer in layers:
                loaded, alone = load(), stream.load(layer)
                assert all(map(torch.equal, loaded.tensors(), alone.tensors()))
                if loaded.experts is not None:
                    loaded.use_experts(loaded.experts)
                hidden = stream.run(layer, loaded, hidden)
        assert hidden.isfinite().all()


def recipe(folder: Path) -> Recipe:
    text = folder / "calibration.txt"
    text.write_text(Path(__file__).read_text() * 2)
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    return Recipe.paper(
        plan=TierPlan.parse("16:0.4,3:0.3,0:0.3"), calibration=calibration, align=1, group_size=32
    )
