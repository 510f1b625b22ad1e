"""Which method each layer of a CAMERA checkpoint gets from vLLM: who holds and computes experts."""

import re
from collections.abc import Mapping
from functools import partial

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from camera_serve.checkpoint.format import CameraQuantizationConfig
from camera_serve.errors import ServingError
from camera_serve.models import MoeStructure, Projection
from camera_serve.vllm_plugin import contract
from camera_serve.vllm_plugin.arrivals import require_filled
from camera_serve.vllm_plugin.biases import refuse_bias, require_bias
from camera_serve.vllm_plugin.drafts import DRAFT_MODEL, draft_layers, why_no_draft
from camera_serve.vllm_plugin.linear import SharedDownMethod, SharedGateUpMethod
from camera_serve.vllm_plugin.loading import StoredNames, TierCounts
from camera_serve.vllm_plugin.moe import CameraMoEMethod
from camera_serve.vllm_plugin.outside import MERGED, kept_method, outside_method
from camera_serve.vllm_plugin.packed_shared import (
    PackedDownMethod,
    PackedGateUpMethod,
    PackedSharedExpert,
)
from camera_serve.vllm_plugin.refusals import refuse_settings
from camera_serve.vllm_plugin.trial import try_layer

_LINEARS: dict[str, tuple[Projection, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
}
"""What each linear layer of vLLM's shared experts holds."""


class LayerMethods:
    """The methods of one model's layers, by its layout and what its family calls them.

    served_names: the checkpoint's name of a module by vLLM's, where they differ; stored: what the
    checkpoint holds, None if it has no weights.
    """

    def __init__(
        self,
        quantization: CameraQuantizationConfig,
        structure: MoeStructure,
        served_names: Mapping[str, str],
        stored: StoredNames | None,
    ) -> None:
        self.quantization = quantization
        self._structure = structure
        self._served_names = served_names
        self._stored_drafts = None if stored is None else draft_layers(stored.carried)
        self._biased = frozenset() if stored is None else stored.biased
        self._unbiased = frozenset() if stored is None else stored.unbiased
        outside = quantization.outside_experts
        self._outside = outside_method(outside) if outside else None
        self._packed: dict[str, PackedSharedExpert] = {}

    def of(
        self, layer: torch.nn.Module, prefix: str, merged: Mapping[str, list[str]]
    ) -> QuantizeMethodBase | None:
        """Ragged methods for routed and shared experts, vLLM's own for all other layers.

        merged: the linear layers that each layer of vLLM's model is made of, if there are several.
        Raises `ServingError` for a MoE layer that neither the layout lists nor drafts tokens: its
        tensors would be read as if they were dense. And for settings that cannot be honoured; vLLM
        has none earlier.
        """
        refuse_settings(get_current_vllm_config())
        prefix = prefix.removeprefix(DRAFT_MODEL)
        if isinstance(layer, RoutedExperts):
            moe_prefix = prefix.removesuffix(".experts")
            stored = self._stored_name(moe_prefix)
            if stored is None:
                self._require_draft(moe_prefix)
                return None
            return self._experts_method(layer, moe_prefix, stored)
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        if not isinstance(layer, LinearBase):
            return None
        module, _, linear = prefix.rpartition(".")
        served, _, name = module.rpartition(".")
        stored = self._stored_name(served)
        if stored and name == self._structure.shared_expert_name:
            return self._shared_method(layer, stored, module, linear)
        names = self._stored_linears(prefix, merged)
        if self._outside and self._is_kept(prefix, names):
            method = kept_method(self._outside, layer, prefix)
        else:
            method = UnquantizedLinearMethod()
            if self._is_in_own_layer(prefix):
                require_filled(method, prefix)
        if biased := names & self._biased:
            require_bias(method, min(biased))
        elif names <= self._unbiased:
            refuse_bias(method, min(names))
        return method

    def _head_method(self, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's own, for the head of the model itself: those of drafts may be filled later."""
        if prefix.rpartition(".")[2] != "lm_head" or _drafts():
            return None
        method = UnquantizedEmbeddingMethod()
        require_filled(method, prefix)
        return method

    def _is_in_own_layer(self, prefix: str) -> bool:
        """Whether a linear layer is of the model's decoder layers, and of no draft's."""
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", prefix)
        own = layer is not None and int(layer[1]) < self._structure.num_layers
        return own and "mtp" not in prefix.split(".") and not _drafts()

    def _stored_linears(self, prefix: str, merged: Mapping[str, list[str]]) -> set[str]:
        """The checkpoint's names of a linear layer: of several, where vLLM has them in one."""
        module, _, name = prefix.rpartition(".")
        parts = {**MERGED, **merged}.get(name, (name,))
        served = (f"{module}.{part}" for part in parts)
        return {self._served_names.get(part, part) for part in served}

    def _is_kept(self, prefix: str, names: set[str]) -> bool:
        """Whether a linear layer is stored in FP8."""
        assert self.quantization.outside_experts
        kept = names.intersection(self.quantization.outside_experts.modules)
        if kept and kept != names:
            raise ServingError(
                f"{prefix} is one layer of vLLM, and {min(kept)} is stored in FP8, "
                f"{min(names - kept)} in 16 bits: compress the model again without --keep-fp8"
            )
        return bool(kept)

    def _stored_name(self, served: str) -> str | None:
        """The layout's name of what vLLM calls this MoE layer; None for one it does not list."""
        name = self._served_names.get(served, served)
        return name if name in self.quantization.layers else None

    def _shared_method(
        self, layer: LinearBase, moe_prefix: str, module: str, linear: str
    ) -> LinearMethodBase:
        shared = self.quantization.layout(moe_prefix).shared
        projections = _LINEARS.get(linear)
        if projections is None or isinstance(layer, ReplicatedLinear):
            raise ServingError(
                f"vLLM builds a shared expert out of {module}.{linear}, a {type(layer).__name__}, "
                f"wanted {', '.join(_LINEARS)} cut for tensor parallelism: start without "
                "--model-impl and --model-class-overrides"
            )
        if min(self.quantization.bits) < 16:
            packed = PackedDownMethod if linear == "down_proj" else PackedGateUpMethod
            return packed(self._packed_shared(shared, module, linear), projections)
        method = SharedDownMethod if linear == "down_proj" else SharedGateUpMethod
        return method(shared, module, projections)

    def _packed_shared(self, counts: TierCounts, module: str, linear: str) -> PackedSharedExpert:
        """The MLP of a linear layer: one for all layers of a module, until it is built again."""
        expert = self._packed.get(module)
        if expert is None or linear in expert.layers:
            expert = PackedSharedExpert(counts, self.quantization.tiers, module)
            self._packed[module] = expert
        expert.layers.add(linear)
        return expert

    def _require_draft(self, moe_prefix: str) -> None:
        config, num_layers = get_current_vllm_config(), self._structure.num_layers
        if reason := why_no_draft(moe_prefix, num_layers, self._stored_drafts, config):
            raise ServingError(
                f"vLLM builds a MoE layer {moe_prefix!r}, which quantization_config does not list: "
                f"it has {len(self.quantization.layers)} layers, the first "
                f"{min(self.quantization.layers)!r}. {reason}"
            )

    def _experts_method(
        self, layer: RoutedExperts, moe_prefix: str, stored: str
    ) -> CameraMoEMethod:
        if contract.is_untested(vllm.__version__):
            try_layer(layer.moe_config)
        number = self._structure.layer_of(stored)
        assert number is not None, "the layout was compared with the model"
        name = partial(self._structure.expert_prefix, number)
        counts = self.quantization.layout(stored).experts
        return CameraMoEMethod(layer.moe_config, counts, self.quantization.tiers, moe_prefix, name)


def _drafts() -> bool:
    """Whether another model may be built with the same method, to draft tokens for this one."""
    return get_current_vllm_config().speculative_config is not None
