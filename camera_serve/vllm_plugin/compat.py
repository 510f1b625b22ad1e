"""Everything that depends on vLLM's version; the rest of the plugin is the same for all of them.

Up to 0.29 the CPU backend has no router: MoE methods get router logits there ("monolithic").
Up to 0.27 vLLM would swap in a modular kernel under data + expert parallelism.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from camera_serve.checkpoint.format import Shapes

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_CPU_ROUTER = f"{_FUSED_MOE}.router.cpu_router"
_CPU_ROUTINGS = (f"{_FUSED_MOE}.cpu_fused_moe", f"{_FUSED_MOE}.experts.cpu_moe")
"""Where `select_experts` is before there is a CPU router: up to 0.27, and up to 0.29."""


class MoEMethodBase(FusedMoEMethodBase):
    """vLLM's MoE method, where `apply` is all that a subclass needs in any version."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        # Found once: torch.compile can trace neither the asking nor an import.
        self._routing = _cpu_routing() if _routes_itself() else None

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves the routing to the method."""
        return self._routing is not None

    def apply_monolithic(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route with vLLM's own CPU routing, then `apply`."""
        assert self._routing
        top_k_weights, top_k_ids = self._routing(
            hidden_states=x,
            router_logits=router_logits,
            use_grouped_topk=layer.use_grouped_topk,
            top_k=layer.top_k,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=layer.e_score_correction_bias,
        )
        return self.apply(layer, x, top_k_weights.float(), top_k_ids.int(), None, None)

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """No modular kernel: vLLM's plain dispatch and combine move the tokens."""


def hub_shapes(model: str, revision: str | None) -> Shapes:
    """Tensor shapes of a hub model from its safetensors headers; empty when it cannot be asked."""
    metadata = get_safetensors_params_metadata(model, revision=revision)
    return {name: tuple(info["shape"]) for name, info in metadata.items()}


def weights_are_read() -> bool:
    """Whether this engine reads a checkpoint: `--load-format dummy` fills in random numbers."""
    return bool(get_current_vllm_config().load_config.load_format != "dummy")


@cache
def _routes_itself() -> bool:
    return bool(current_platform.is_cpu()) and find_spec(_CPU_ROUTER) is None


def _cpu_routing() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    module = import_module(next(name for name in _CPU_ROUTINGS if find_spec(name)))
    routing: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.select_experts
    return routing
