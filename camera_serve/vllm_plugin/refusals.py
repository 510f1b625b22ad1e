"""What of vLLM's settings experts of different widths cannot be served with, and the remedy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode, VllmConfig

from camera_serve.errors import ServingError
from camera_serve.models import MoeStructure
from camera_serve.vllm_plugin import choice, contract

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

LOAD_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "dummy",
)
"""Those that hand over the tensors of safetensors files one by one, and the one that reads none.

The others unpickle (`pt`, `npcache`), want other files (`mistral`, `gguf`), or fill parameters past
their loaders, as a running engine of equal experts had them (`sharded_state`, `tensorizer`, …).
"""

_GATHERING = ("allgather_reducescatter", "naive")
"""The all-to-all backends that need nothing of a MoE kernel."""


def refuse_settings(config: VllmConfig) -> None:
    """Raise `ServingError` naming the first flag that cannot be honoured."""
    for problem in _weight_settings(config):
        raise ServingError(problem)
    for problem in _kernel_settings(config):
        raise ServingError(problem)


def refuse_layer(layer: "RoutedExperts", moe_prefix: str, num_experts: int) -> None:
    """Raise `ServingError` for a MoE layer whose math or size is not what the kernels compute."""
    # Not above: it brings all of vLLM's MoE layers, and this module is imported for every model.
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    contract.require_attributes(layer, moe_prefix)
    if layer.activation != MoEActivation.SILU:
        raise ServingError(f"{moe_prefix}: activation {layer.activation} is not silu")
    for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
        if (found := getattr(layer, name, None)) is not None:
            raise ServingError(f"{moe_prefix}: {name} {found} is not known: silu is taken as it is")
    if layer.apply_router_weight_on_input:
        raise ServingError(f"{moe_prefix}: router weights on the experts' input are not known")
    if layer.moe_config.has_bias:
        raise ServingError(f"{moe_prefix}: experts with a bias are not known")
    if layer.global_num_experts != num_experts:
        raise ServingError(
            f"{moe_prefix}: vLLM wants {layer.global_num_experts} experts, the checkpoint has "
            f"{num_experts}: fused shared or redundant experts are not supported"
        )


def refuse_method(asked: str | None, stored: str | None) -> None:
    """Raise `ServingError` where one of `--quantization` and the checkpoint names us, one another.

    asked: what the user said; stored: the `quant_method` of the checkpoint.
    """
    if asked is None or asked == stored or "camera" not in (asked, stored):
        return
    if stored == "camera":
        raise ServingError(
            f"--quantization {asked}: this checkpoint is quantized by CAMERA already, and experts "
            f"of different widths have no {asked} kernel: start without --quantization"
        )
    raise ServingError(
        f"--quantization camera: this checkpoint is quantized with {stored}: start without "
        "--quantization, or compress its 16-bit original with camera-serve"
    )


def refuse_overrides(asked: MoeStructure, stored: MoeStructure, model: str) -> None:
    """Raise `ServingError` when vLLM was told other sizes than those of the stored tensors."""
    for name in ("num_layers", "moe_layers", "d_model", "d_ff", "shared_d_ff", "num_experts"):
        wanted, found = getattr(asked, name), getattr(stored, name)
        if wanted != found:
            raise ServingError(
                f"--hf-overrides or --hf-config-path makes {name} {wanted}; {model} has {found}, "
                "and tensors of this size: start without it"
            )


def _weight_settings(config: VllmConfig) -> Iterator[str]:
    """Flags about where weights come from and where they lie."""
    load_format = config.load_config.load_format
    if load_format not in LOAD_FORMATS:
        yield (
            f"--load-format {load_format}: the experts of a CAMERA checkpoint are read from its "
            f"safetensors files, one by one: use one of {', '.join(LOAD_FORMATS)}"
        )
    if config.model_config and config.model_config.quantization_config is not None:
        yield (
            "--quantization-config: vLLM would quantize layers while it loads them, and experts of "
            "different widths have no such kernel: start without it, or compress to fewer --bits"
        )
    offload = config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        flag = "--cpu-offload-gb" if offload.uva.cpu_offload_gb else "--offload-group-size"
        yield (
            f"{flag}: the kernel holds its weights itself, and vLLM cannot move them while it "
            "runs: start without it; a plan with fewer bits needs less memory"
        )
    if config.weight_transfer_config is not None:
        yield (
            "--weight-transfer-config: a trainer's weights have the original widths: compress them "
            "first, and start with the compressed folder (or call reload_weights with one of the "
            "same layout)"
        )
    if config.parallel_config.enable_eplb:
        yield (
            "--enable-eplb: load balancing moves experts between equal slots, and the experts of a "
            "CAMERA checkpoint differ in width: start without it"
        )
    if config.lora_config is not None:
        yield (
            "--enable-lora: adapters are made for experts of the original width: merge the adapter "
            "into the dense model and compress that, or start without it"
        )


def _kernel_settings(config: VllmConfig) -> Iterator[str]:
    """Flags about who computes the layer."""
    if (backend := config.kernel_config.moe_backend) != "auto":
        yield (
            f"--moe-backend {backend} computes experts of equal width; those of a CAMERA "
            "checkpoint have a kernel of their own: start without it"
        )
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 and parallel.all2all_backend not in _GATHERING:
        yield (
            f"--all2all-backend {parallel.all2all_backend} is a part of vLLM's own MoE kernels: "
            f"start without it ({_GATHERING[0]})"
        )
    graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    dtype = config.model_config.dtype if config.model_config else None
    if graphs and dtype and (reason := choice.why_no_cuda_graphs(dtype)):
        yield (
            f"experts would run in a loop that CUDA graphs cannot capture ({reason}): start with "
            "--enforce-eager"
        )
