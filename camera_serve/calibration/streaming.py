"""One decoder layer at a time: weights read lazily, run on all calibration tokens, then dropped.

The peak is one layer and the activations, whatever the model's size; on a GPU two layers, as the
next one is read and copied there while one computes. transformers runs the attention and the
router; only the experts are ours, behind the interface every family shares:
`experts(hidden_states, top_k_index, top_k_weights)`.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from camera_serve.calibration.prefetch import reading_ahead
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import (
    CameraError,
    DamagedWeightsError,
    UnsupportedModelError,
    described,
    is_out_of_memory,
)
from camera_serve.models.building import build_on_meta
from camera_serve.models.modules import layer_stack
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import RaggedLayer, RaggedTier, ragged_moe

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 16384
"""Tokens run through a layer at once: enough to fill a GPU, small beside one layer's weights."""


_SHAPES_HELD = 4
"""Shapes of batches whose masks and rotary tables are held: full ones, the last, and a trial's."""


def layers_at_once(device: torch.device) -> int:
    """Decoder layers in memory at a time: a GPU's next one is read while it computes."""
    return 2 if device.type == "cuda" else 1


class RoutedExperts(nn.Module):
    """A ragged layer behind the experts interface of transformers."""

    def __init__(self, layer: RaggedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[num_tokens, d_model]`, `[num_tokens, top_k]` twice -> `[num_tokens, d_model]`."""
        return ragged_moe(hidden_states, top_k_weights, top_k_index, self.layer)


@dataclass(frozen=True)
class StreamedLayer:
    """One decoder layer with its weights loaded.

    `experts` are the routed experts in 16 bits, None for a dense layer. `moe_name` is where the
    layer has its MoE block, `shared_name` where that has its shared experts.
    """

    module: Any
    experts: RaggedTier[torch.Tensor] | None
    moe_name: str
    shared: Any = None
    shared_gate: torch.Tensor | None = None
    shared_name: str = ""

    @property
    def moe(self) -> Any:
        """The layer's MoE block."""
        return self.module.get_submodule(self.moe_name)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All weights."""
        yield from self.module.state_dict().values()
        if self.experts:
            yield from (self.experts.gate, self.experts.up, self.experts.down)

    def use_experts(self, experts: RaggedTier[torch.Tensor]) -> None:
        """Run `experts` where the family's own experts module stood."""
        self.moe.experts = RoutedExperts(RaggedLayer((experts,)))

    def experts_replaced(
        self, routed: nn.Module, shared: nn.Module | None
    ) -> AbstractContextManager[None]:
        """Run other experts for a while; the layer's own shared ones where `shared` is None."""
        children = {"experts": routed}
        if self.shared is not None and shared is not None:
            children[self.shared_name] = shared
        return replaced(self.moe, children)


@dataclass(frozen=True)
class _Call:
    """What a layer is given beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextmanager
def replaced(module: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give a module other children for a while, by name."""
    own = {name: module.get_submodule(name) for name in children}
    try:
        for name, child in children.items():
            setattr(module, name, child)
        yield
    finally:
        for name, child in own.items():
            setattr(module, name, child)


class ModelStream:
    """A model whose decoder layers are loaded one by one.

    `dtype` is what the activations and weights are computed in.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.structure = checkpoint.structure
        self.device = device
        self.dtype = dtype
        config = copy.deepcopy(checkpoint.config)
        model = build_on_meta(config, dtype).eval()
        self.stack = layer_stack(model, self.structure.modules)
        self.layers = list(self.stack.layers)
        self._dtypes = model._get_dtype_plan(dtype)
        self._embedding = self.stack.get_input_embeddings()
        self._calls: dict[torch.Size, list[_Call]] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Make all of the stack real but its embedding, its layers and its last norm."""
        skipped = {id(self._embedding), id(self.stack.layers)}
        for name, child in self.stack.named_children():
            if id(child) in skipped:
                continue
            if "rotary" in name or "pos_emb" in name:
                config = getattr(child, "config", None) or self.stack.config
                setattr(self.stack, name, type(child)(config=config).to(self.device))
            else:
                setattr(self.stack, name, nn.Identity())

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What enters the first layer: int64 `[samples, seq_len]` -> `[..., d_model]` on CPU.

        The family's own model makes it, so that an embedding that is scaled is scaled.
        """
        embedding = copy.copy(self._embedding)
        weight = self.checkpoint.get(self.structure.embedding_name).to(self.dtype)
        embedding._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        hidden = torch.empty((*tokens.shape, self.structure.d_model), dtype=self.dtype)
        done = 0
        for batch in tokens.split(self._batch_size(tokens)):
            with self._running(0):
                hidden[done : done + len(batch)] = self._enter(embedding(batch).to(self.device))[0]
            done += len(batch)
        return hidden

    @contextmanager
    def loading(self, layers: range) -> Iterator[Callable[[], StreamedLayer]]:
        """A function whose calls give these layers in turn, `layers_at_once` in memory.

        Drop a layer before asking for the next. Errors come with the layer they belong to.
        """
        if layers_at_once(self.device) == 1:
            numbers = iter(layers)
            yield lambda: self.load(next(numbers))
            return
        reader = _Reader(self)
        with reading_ahead(reader.read, layers) as next_layer:
            yield lambda: reader.take(*next_layer())

    def load(self, layer: int) -> StreamedLayer:
        """Read one decoder layer onto the device."""
        try:
            return self._load(layer)
        finally:
            self.checkpoint.release()

    def _load(self, layer: int) -> StreamedLayer:
        module = copy.deepcopy(self.layers[layer])
        modules, has_experts = self.structure.modules, layer in self.structure.moe_layers
        if has_experts:
            module.get_submodule(modules.moe_name).experts = nn.Identity()
        module.load_state_dict(self._weights(layer, module), assign=True)
        if not has_experts:
            return StreamedLayer(module, None, modules.moe_name)
        loaded = StreamedLayer(module, self._experts(layer), modules.moe_name)
        if not self.structure.shared_d_ff:
            return loaded
        gate = modules.shared_gate_name
        return replace(
            loaded,
            shared=loaded.moe.get_submodule(modules.shared_name),
            shared_gate=loaded.moe.get_submodule(gate).weight if gate else None,
            shared_name=modules.shared_name,
        )

    def run(self, layer: int, loaded: StreamedLayer, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's outputs for all samples, in place of its inputs, which are returned.

        hidden: `[samples, seq_len, d_model]` on CPU, in the dtype of the stream.
        """
        done = 0
        for batch in self.outputs(layer, loaded, hidden):
            hidden[done : done + len(batch)] = batch
            done += len(batch)
        return hidden

    @torch.inference_mode()
    def outputs(
        self, layer: int, loaded: StreamedLayer, hidden: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The layer's outputs, batch by batch of about `TOKENS_PER_BATCH` tokens.

        Raises `DamagedWeightsError` where config.json and weights make nothing, or NaN or Inf.
        """
        for batch in hidden.split(self._batch_size(hidden)):
            output = self._output(layer, loaded, batch)
            if not output.isfinite().all():
                raise DamagedWeightsError(self._not_finite(layer, output))
            yield output

    def _output(self, layer: int, loaded: StreamedLayer, batch: torch.Tensor) -> torch.Tensor:
        inputs = batch.to(self.device)
        with self._running(layer):
            call = self._calls_of(inputs)[layer]
            output = loaded.module(inputs, *call.arguments, **call.keywords)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    @contextmanager
    def _running(self, layer: int) -> Iterator[None]:
        """Say of what transformers raises that it is config.json's: it checks few settings."""
        try:
            yield
        except Exception as error:
            broken = type(error).__name__ == "AcceleratorError"
            if broken or isinstance(error, CameraError) or is_out_of_memory(error):
                raise
            logger.info("layer %d cannot be run", layer, exc_info=True)
            raise DamagedWeightsError(
                f"{self.checkpoint.path / 'config.json'}: layer {layer} cannot be run with these "
                f"settings: {described(error)}"
            ) from error

    def _calls_of(self, embedded: torch.Tensor) -> "list[_Call]":
        """How the family's own model calls each layer.

        Masks and rotary tables depend on the shape `[batch, seq_len]` alone: no window is padded.
        """
        shape = embedded.shape[:2]
        if shape not in self._calls:
            if len(self._calls) == _SHAPES_HELD:
                self._calls.pop(next(iter(self._calls)))
            self._calls[shape] = self._enter(embedded)[1]
        return self._calls[shape]

    def _enter(self, embedded: torch.Tensor) -> "tuple[torch.Tensor, list[_Call]]":
        """Run the family's model around its layers: what enters the first, and how each is called.

        embedded: `[batch, seq_len, d_model]` on the device, token embeddings.
        """
        entered: list[torch.Tensor] = []
        calls: list[_Call] = []

        def recorded(hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            entered.append(hidden_states)
            calls.append(_Call(arguments, keywords))
            return hidden_states

        # Copies of the modules alone, as another thread may be reading a layer from these.
        recorders = [copy.copy(layer) for layer in self.layers]
        for recorder in recorders:
            recorder.forward = recorded
        with replaced(self.stack, {"layers": nn.ModuleList(recorders)}):
            self.stack(inputs_embeds=embedded, use_cache=False)
        if len(calls) != len(self.layers) or any(x is not entered[0] for x in entered):
            raise UnsupportedModelError(
                f"{type(self.stack).__name__} does more between its layers than hand on what they "
                "return: it cannot be run layer by layer"
            )
        return entered[0], calls

    def _batch_size(self, tokens: torch.Tensor) -> int:
        return max(1, TOKENS_PER_BATCH // tokens.shape[1])

    def _not_finite(self, layer: int, output: torch.Tensor) -> str:
        bad = int((~output.isfinite()).any(-1).sum())
        narrow = "use --dtype bfloat16 or float32"
        other = "config.json is not that of these weights, or they are damaged"
        return (
            f"{self.checkpoint.path}: layer {layer} makes NaN or Inf of {bad} of "
            f"{output[..., 0].numel()} tokens when computed in {self.dtype}: "
            f"{narrow if self.dtype == torch.float16 else other}"
        )

    def _weights(self, layer: int, module: nn.Module) -> dict[str, torch.Tensor]:
        prefix = f"{self.structure.modules.layers_name}.{layer}"
        weights = {}
        for name in module.state_dict():
            on_disk = self.structure.to_checkpoint_name(f"{prefix}.{name}")
            dtype = self._dtype_of(f"{prefix}.{name}")
            weights[name] = self._on_device(self.checkpoint.get(on_disk)).to(dtype)
        return weights

    def _dtype_of(self, name: str) -> torch.dtype:
        """What transformers loads a weight of this name in: some stay in float32."""
        found = (
            dtype
            for part, dtype in self._dtypes.items()
            if re.search(part.replace("*", ".*"), name)
        )
        return next(found, self.dtype)

    def _on_device(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy from memory that is not pinned would keep the GPU's other streams waiting."""
        if self.device.type == "cuda":
            weight = weight.pin_memory()
        return weight.to(self.device, non_blocking=True)

    def _experts(self, layer: int) -> RaggedTier[torch.Tensor]:
        d_ff, num_experts = self.structure.d_ff, self.structure.num_experts
        shape = (num_experts, d_ff, self.structure.d_model)
        gate, up, down = torch.empty((3, *shape), dtype=self.dtype, device=self.device)
        for expert in range(num_experts):
            for projection, matrix in zip(PROJECTIONS, (gate, up, down), strict=True):
                name = f"{self.structure.expert_prefix(layer, expert, projection)}.weight"
                weight = self._on_device(self.checkpoint.get(name))
                matrix[expert].copy_(weight.T if projection == "down" else weight)
        offsets = tuple(d_ff * expert for expert in range(num_experts + 1))
        return RaggedTier(gate.flatten(0, 1), up.flatten(0, 1), down.flatten(0, 1), offsets)


class _Reader:
    """Loads layers in another thread, on a GPU in a CUDA stream beside the computing one."""

    def __init__(self, stream: ModelStream) -> None:
        self._stream = copy.copy(stream)
        # Its own handles: whoever reads beside it releases theirs at any moment.
        self._stream.checkpoint = replace(stream.checkpoint, _handles={})
        device = stream.device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, layer: int) -> tuple[StreamedLayer, torch.cuda.Event | None]:
        """A layer, and what to wait for before its weights are used: in the reading thread."""
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            loaded = self._stream.load(layer)
        return loaded, self._copies.record_event() if self._copies else None

    def take(self, loaded: StreamedLayer, copied: torch.cuda.Event | None) -> StreamedLayer:
        """Hand a layer over to the stream that computes."""
        if copied:
            computing = torch.cuda.current_stream(self._stream.device)
            computing.wait_event(copied)
            for tensor in loaded.tensors():
                # Or its memory might be given to the next layer's copies while it is still read.
                tensor.record_stream(computing)
        return loaded
