"""A layer whose attention runs once, against two plain runs of it: the same to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from camera_serve import AnalysisSettings, Calibration, Recipe, TierPlan, analyze, compress
from camera_serve.calibration import streaming
from camera_serve.calibration.attention import AddsNothing
from camera_serve.calibration.streaming import ModelStream, StreamedLayer
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.compression.layer import set_shared
from camera_serve.errors import UnsupportedModelError
from camera_serve.ragged.layer import RaggedTier
from camera_serve.ranking.energy import RoutedExpertsMeter, SharedExpertMeter
from camera_serve.ranking.layer import measure, run_measured, scale_of_routed
from camera_serve.ranking.selection import select_rows
from tests import tiny_models

CPU = torch.device("cpu")
ALPHA = 0.9
SAMPLES, SEQ_LEN = 5, 48


@pytest.fixture(autouse=True)
def _batches_of_two_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TOKENS_PER_BATCH", 2 * SEQ_LEN)


def opened(family: str, folder: Path, dtype: torch.dtype, **settings: Any) -> ModelStream:
    path = tiny_models.save(family, folder, dtype=dtype, **settings)
    return ModelStream(Checkpoint.open(path), CPU, dtype)


def some_input(stream: ModelStream) -> torch.Tensor:
    return stream.embed(torch.randint(0, tiny_models.VOCAB_SIZE, (SAMPLES, SEQ_LEN)))


def halve(loaded: StreamedLayer) -> None:
    """Leave every other micro-expert of each expert, the shared ones too."""
    assert loaded.experts is not None
    widths = torch.tensor(loaded.experts.offsets).diff().tolist()
    kept = [torch.arange(0, width, 2) for width in widths]
    loaded.use_experts(select_rows(loaded.experts, kept, CPU))
    if loaded.shared is not None:
        gate, up, down = (
            getattr(loaded.shared, f"{p}_proj").weight for p in ("gate", "up", "down")
        )
        set_shared(loaded.shared, RaggedTier(gate[::2], up[::2], down.T[::2], (0, len(gate) // 2)))


def keep_all(loaded: StreamedLayer) -> None:
    assert loaded.experts is not None
    loaded.use_experts(loaded.experts)


@torch.inference_mode()
def two_runs(
    stream: ModelStream,
    layer: int,
    loaded: StreamedLayer,
    hidden: torch.Tensor,
    change: Callable[[StreamedLayer], None],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Energies by one whole run of a layer, and by another its output with its experts changed."""
    assert loaded.experts is not None
    mlp, meters = loaded.moe, [RoutedExpertsMeter(loaded.experts, CPU)]
    mlp.experts = meters[0]
    if loaded.shared is not None:
        meters.append(SharedExpertMeter(loaded.shared, loaded.shared_gate))
        setattr(mlp, loaded.shared_name, meters[1])
    for _ in stream.outputs(layer, loaded, hidden.clone()):
        pass
    scale = getattr(mlp, "routed_scaling_factor", 1.0)  # Laguna's; others have it in the router.
    energies = [scale**2 * meters[0].sums.energies(loaded.experts.down, ALPHA)]
    if loaded.shared is not None:
        energies.append(meters[1].sums.energies(loaded.shared.down_proj.weight.T, ALPHA))
        setattr(mlp, loaded.shared_name, loaded.shared)
    change(loaded)
    return energies, torch.cat(list(stream.outputs(layer, loaded, hidden.clone())))


def assert_same_bits(
    stream: ModelStream, layer: int, load: Callable[[], StreamedLayer], hidden: torch.Tensor
) -> None:
    """Both ways through a layer, as it is and with changed experts, give what two runs give."""
    for change in (keep_all, halve):
        energies, output = two_runs(stream, layer, load(), hidden, change)
        loaded, given = load(), hidden.clone()
        found = measure(stream, layer, loaded, given, ALPHA)
        change(loaded)
        assert found.experts.flatten().equal(energies[0])
        assert found.shared.equal(torch.cat([energies[0][:0], *energies[1:]]))
        assert stream.run(layer, loaded, given).view(torch.uint8).equal(output.view(torch.uint8))
        assert not output.equal(hidden)
    energies, output = two_runs(stream, layer, load(), hidden, keep_all)
    given = hidden.clone()
    found = run_measured(stream, layer, load(), given).energies(ALPHA)
    assert torch.cat(found.per_expert).equal(torch.cat(energies))
    assert given.view(torch.uint8).equal(output.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_one_run_of_the_attention_gives_the_bytes_of_two(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    stream = opened(family, tmp_path, dtype)
    hidden = some_input(stream)
    for layer in stream.structure.moe_layers:
        assert_same_bits(stream, layer, lambda layer=layer: stream.load(layer), hidden)


def test_without_shared_experts_too(tmp_path: Path) -> None:
    stream = opened("deepseek", tmp_path, torch.bfloat16, n_shared_experts=0)
    assert_same_bits(stream, 1, lambda: stream.load(1), some_input(stream))


def test_what_adds_nothing_changes_no_bit() -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, -3.0, torch.inf], dtype=torch.bfloat16)
    for stand_in in (AddsNothing(), lambda x: AddsNothing(returns=2)(hidden_states=x)[0]):
        assert (x + stand_in(x)).view(torch.int16).equal(x.view(torch.int16))


@pytest.mark.parametrize(("family", "scale"), [("laguna", 2.446), ("deepseek_v3", 1.0)])
def test_a_scale_beside_the_routing_weights_is_found(
    family: str, scale: float, tmp_path: Path
) -> None:
    own = {"moe_routed_scaling_factor": scale} if family == "laguna" else {}
    stream = opened(family, tmp_path, torch.bfloat16, **own)
    found = scale_of_routed(stream.load(1), "model.layers.1.mlp")
    # As float32 has it, where bfloat16 would have 2.453.
    assert found == pytest.approx(scale, rel=1e-6)


def test_a_block_that_does_more_than_scale_the_sum_of_its_experts_is_refused(
    tmp_path: Path,
) -> None:
    loaded = opened("qwen3_moe", tmp_path, torch.bfloat16).load(0)
    loaded.moe.register_forward_hook(lambda *call: call[-1].cumsum(-1))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp: .* more .* than scale it"):
        scale_of_routed(loaded, "model.layers.0.mlp")


class Counter:
    """Counts the tokens that pass the attention of the layers a stream loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, load = 0, ModelStream.load

        def counted(stream: ModelStream, layer: int) -> StreamedLayer:
            loaded = load(stream, layer)
            names = ("linear_attn", "self_attn", "conv")
            attention = next(getattr(loaded.module, n) for n in names if hasattr(loaded.module, n))
            attention.register_forward_pre_hook(self._count, with_kwargs=True)
            return loaded

        monkeypatch.setattr(ModelStream, "load", counted)

    def _count(self, _: nn.Module, __: tuple[()], arguments: dict[str, Any]) -> None:
        self.tokens += arguments["hidden_states"].shape[:2].numel()


@pytest.mark.parametrize("step", ["analyze", "compress"])
@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_tokens_pass_the_attention_of_a_layer_once(
    family: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save(family, tmp_path / "model")
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    calibration = Calibration(
        source=str(tmp_path / "text.txt"), samples=2 * SAMPLES, seq_len=SEQ_LEN
    )
    counter = Counter(monkeypatch)
    if step == "analyze":
        analyze(path, tmp_path / "out", AnalysisSettings(calibration=calibration))
    else:
        recipe = Recipe.paper(plan=TierPlan.prune(0.5), calibration=calibration, align=4)
        compress(path, tmp_path / "out", recipe)
    layers = Checkpoint.open(path).structure.num_layers
    assert calibration.num_tokens <= counter.tokens / layers < 1.1 * calibration.num_tokens


class Mixer(nn.Module):
    """An attention that returns its output alone, as linear attention does."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.attention(hidden_states=hidden_states, **arguments)[0]


Form = Callable[..., torch.Tensor]


def scaled_branches(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As Granite: what is added is scaled."""
    attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)[0]
    hidden_states = hidden_states + attended * 0.22
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * 0.22


def normed_branches(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As FlexOlmo: norms after the attention and after the experts."""
    attended = self.self_attn(hidden_states=hidden_states, **arguments)[0]
    hidden_states = hidden_states + self.input_layernorm(attended)
    return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


def linear_attention(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As hybrid models: another name, and no tuple."""
    mixed = self.linear_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
    hidden_states = hidden_states + mixed
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def normed_sum(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As MiniMax: the sum itself is normed."""
    hidden_states = self.input_layernorm(hidden_states)
    attended = self.self_attn(hidden_states=hidden_states, **arguments)[0]
    hidden_states = self.post_attention_layernorm(hidden_states + attended)
    return hidden_states + self.mlp(hidden_states)


def scaled_sum(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As Gemma 4: the layer's output is scaled."""
    attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)[0]
    hidden_states = hidden_states + attended
    return 0.5 * (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)))


def side_by_side(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Attention and experts are given the same."""
    normed = self.input_layernorm(hidden_states)
    attended = self.self_attn(hidden_states=normed, **arguments)[0]
    return hidden_states + attended + self.mlp(normed)


@pytest.mark.parametrize(
    ("form", "once"),
    [
        (scaled_branches, True),
        (normed_branches, True),
        (linear_attention, True),
        (normed_sum, False),
        (scaled_sum, False),
        (side_by_side, False),
    ],
)
def test_layers_of_other_forms_give_the_bytes_of_two_runs(
    form: Form, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened("qwen3_moe", tmp_path, torch.bfloat16)
    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", form)
    attention: list[nn.Module] = []

    def load() -> StreamedLayer:
        loaded = stream.load(0)
        attention.append(loaded.module.self_attn)
        if form is linear_attention:
            loaded.module.linear_attn = Mixer(loaded.module.self_attn)
            del loaded.module.self_attn
        return loaded

    hidden = some_input(stream)
    assert_same_bits(stream, 0, load, hidden)
    loaded = load()
    measure(stream, 0, loaded, hidden, ALPHA)
    assert once != (attention[-1] in loaded.module.modules())
