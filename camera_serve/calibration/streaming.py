"""One decoder layer at a time: weights read lazily, run on all calibration tokens, then dropped.

The peak is one layer and the activations, whatever the model's size; on a GPU two layers, as the
next one is read and copied there while one computes. transformers runs the attention and the
router; only the experts are ours, behind the interface every family shares:
`experts(hidden_states, top_k_index, top_k_weights)`.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from camera_serve.calibration.prefetch import reading_ahead
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CameraError, DamagedWeightsError, described, is_out_of_memory
from camera_serve.models.building import build_on_meta
from camera_serve.models.structure import PROJECTIONS
from camera_serve.ragged.layer import RaggedLayer, RaggedTier, ragged_moe

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 16384
"""Tokens run through a layer at once: enough to fill a GPU, small beside one layer's weights."""


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

    `experts` are the routed experts in 16 bits, None for a dense layer. `shared_name` is where the
    MoE block has its shared experts.
    """

    module: Any
    experts: RaggedTier[torch.Tensor] | None
    shared: Any = None
    shared_gate: torch.Tensor | None = None
    shared_name: str = ""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All weights."""
        yield from self.module.state_dict().values()
        if self.experts:
            yield from (self.experts.gate, self.experts.up, self.experts.down)

    def use_experts(self, experts: RaggedTier[torch.Tensor]) -> None:
        """Run `experts` where the family's own experts module stood."""
        self.module.mlp.experts = RoutedExperts(RaggedLayer((experts,)))

    def experts_replaced(
        self, routed: nn.Module, shared: nn.Module | None
    ) -> AbstractContextManager[None]:
        """Run other experts for a while; the layer's own shared ones where `shared` is None."""
        children = {"experts": routed}
        if self.shared is not None and shared is not None:
            children[self.shared_name] = shared
        return replaced(self.module.mlp, children)


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
        # transformers' own model forward runs a stack of one: it makes masks and rotary tables
        # as the family wants them, and only its first `num_hidden_layers` layers are looked at.
        config = copy.deepcopy(checkpoint.config)
        model = build_on_meta(config, dtype).eval()
        self.stack = model.model
        self.layers = list(self.stack.layers)
        self.layer_types = list(getattr(config, "layer_types", None) or [])
        self.keep_float32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self.stack.norm = nn.Identity()
        self.stack.rotary_emb = type(self.stack.rotary_emb)(config=config).to(device)
        self.stack.config.num_hidden_layers = 1

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings: int64 `[samples, seq_len]` -> `[samples, seq_len, d_model]` on CPU."""
        weight = self.checkpoint.get("model.embed_tokens.weight").to(self.dtype)
        return nn.functional.embedding(tokens, weight)

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
        has_experts = layer in self.structure.moe_layers
        if has_experts:
            module.mlp.experts = nn.Identity()
        module.load_state_dict(self._weights(layer, module), assign=True)
        if not has_experts:
            return StreamedLayer(module, None)
        experts = self._experts(layer)
        family = self.structure.family
        if not self.structure.shared_d_ff or not family.shared_name:
            return StreamedLayer(module, experts)
        gate = getattr(module.mlp, family.shared_gate_name) if family.shared_gate_name else None
        shared = getattr(module.mlp, family.shared_name)
        weight = None if gate is None else gate.weight
        return StreamedLayer(module, experts, shared, weight, family.shared_name)

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
        self.stack.layers = nn.ModuleList([loaded.module])
        if self.layer_types:
            self.stack.config.layer_types = [self.layer_types[layer]]
        try:
            for batch in hidden.split(max(1, TOKENS_PER_BATCH // hidden.shape[1])):
                output = self._output(layer, batch)
                if not output.isfinite().all():
                    raise DamagedWeightsError(self._not_finite(layer, output))
                yield output
        finally:
            # Or this layer would still be held while the next one is read.
            self.stack.layers = nn.ModuleList()

    def _output(self, layer: int, batch: torch.Tensor) -> torch.Tensor:
        inputs = batch.to(self.device)
        try:
            return self.stack(inputs_embeds=inputs, use_cache=False).last_hidden_state.cpu()
        except Exception as error:  # transformers checks few settings: the rest fails in its code.
            broken = type(error).__name__ == "AcceleratorError"
            if broken or isinstance(error, CameraError) or is_out_of_memory(error):
                raise
            logger.info("layer %d cannot be run", layer, exc_info=True)
            raise DamagedWeightsError(
                f"{self.checkpoint.path / 'config.json'}: layer {layer} cannot be run with these "
                f"settings: {described(error)}"
            ) from error

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
        prefix = self.structure.to_hf_name(self.structure.layer_prefix(layer))
        weights = {}
        for name in module.state_dict():
            on_disk = self.structure.to_checkpoint_name(f"{prefix}.{name}")
            exact = name.endswith(self.keep_float32) if self.keep_float32 else False
            dtype = torch.float32 if exact else self.dtype
            weights[name] = self._on_device(self.checkpoint.get(on_disk)).to(dtype)
        return weights

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
