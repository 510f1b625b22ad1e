"""Biases that the checkpoint or vLLM's model has, and the other has not: vLLM says nothing."""

from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from camera_serve.errors import ServingError


def require_bias(method: QuantizeMethodBase, stored: str) -> None:
    """Let a linear layer's method raise `ServingError` once loaded, if vLLM built it without bias.

    stored: what the checkpoint calls the layer. Only then: a layer asks for its method before it
    has a bias.
    """
    process = method.process_weights_after_loading

    def process_with_bias(layer: nn.Module) -> None:
        if getattr(layer, "bias", None) is None:
            raise ServingError(
                f"{stored}.bias is in the checkpoint, and vLLM's model of this family has no bias "
                "there: it would be left out, and the answers would be another model's. Use "
                "transformers (`import camera_serve.hf`), or a vLLM whose model has it"
            )
        process(layer)

    method.process_weights_after_loading = process_with_bias


def refuse_bias(method: QuantizeMethodBase, stored: str) -> None:
    """The other way round: let it raise `ServingError` if vLLM built the layer with a bias."""
    process = method.process_weights_after_loading

    def process_without_bias(layer: nn.Module) -> None:
        if getattr(layer, "bias", None) is not None:
            raise ServingError(
                f"vLLM's model of this family has a bias for {stored}, and the checkpoint has "
                "none: it would hold whatever lies in memory. Use transformers (`import "
                "camera_serve.hf`), or a vLLM whose model has no bias there"
            )
        process(layer)

    method.process_weights_after_loading = process_without_bias
