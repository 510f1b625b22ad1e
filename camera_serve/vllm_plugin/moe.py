"""Routed experts in vLLM: ragged parameters, their loading, and the call of the kernel."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from camera_serve.checkpoint.format import PARTS, Part, Tiers
from camera_serve.errors import ServingError
from camera_serve.kernels import RaggedLayer, RaggedTier, cpu, ragged_moe
from camera_serve.models import Projection
from camera_serve.vllm_plugin.compat import MoEMethodBase, weights_are_read
from camera_serve.vllm_plugin.loading import (
    RankRows,
    RankSplit,
    RowLoader,
    TierCounts,
    fill_dummy_grids,
    part_dtype,
    split_layer,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger(__name__)

_PROJECTIONS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}


class CameraMoEMethod(MoEMethodBase):
    """The experts of one MoE layer, each at its own d_ff.

    counts: micro-experts by expert and tier; moe_prefix: `model.layers.3.mlp`; name: the checkpoint
    prefix of an expert's projection. Raises `ServingError` for what the kernel cannot do.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        counts: TierCounts,
        tiers: Tiers,
        moe_prefix: str,
        name: Callable[[int, Projection], str],
    ) -> None:
        super().__init__(moe)
        self._counts = counts
        self._tiers = tiers
        self._prefix = moe_prefix
        self._name = name
        self._loader: RowLoader | None = None
        self._cpu_tiers: list[torch.Tensor] = []
        self._refuse_engine_settings()

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the rank's rows of every tier only (`RankRows`); gate and up come in pairs.

        Down is stored transposed. Experts of other ranks have no rows, so global expert ids index
        `ragged_offsets` on every rank and no expert map is needed.
        """
        self._refuse_layer_settings(layer)
        split = self._split(layer)
        self._loader = RowLoader(split, self._tiers, self._name, hidden_size)
        for part, shape in RankRows.shapes(split.num_rows, self._tiers, hidden_size).items():
            dtype = part_dtype(part, params_dtype)
            for name, full in ((f"w13_{part}", (2, *shape)), (f"w2_{part}", shape)):
                weight = Parameter(torch.empty(full, dtype=dtype), requires_grad=False)
                set_weight_attrs(weight, {"weight_loader": partial(self._load, layer, part)})
                layer.register_parameter(name, weight)
        offsets = torch.tensor(split.offsets, dtype=torch.int64)
        layer.register_buffer("ragged_offsets", offsets, persistent=False)

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """The sizes as they are: the kernel needs no padding."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> None:
        """None: vLLM's own MoE kernels are not used."""

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Refuse to serve weights that never arrived; random weights are wanted for `dummy`.

        Then hand the rows over to the fast kernel of the device, where there is one.
        """
        if not weights_are_read():
            fill_dummy_grids(layer.w13_scales, layer.w2_scales)
        elif self._loader:
            self._loader.check_complete()
        if current_platform.is_cpu():
            self._pack_for_cpu(layer)

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The rank's summand of the layer's output, as x: `[num_tokens, d_model]`."""
        bits = list(self._tiers.bits)
        if self._cpu_tiers:
            return torch.ops.vllm.camera_cpu_moe(
                x, topk_weights, topk_ids, self._cpu_tiers, bits, self._tiers.group_size
            )
        gate_up = [getattr(layer, f"w13_{part}") for part in PARTS]
        down = [getattr(layer, f"w2_{part}") for part in PARTS]
        return torch.ops.vllm.camera_ragged_moe(
            x, topk_weights, topk_ids, gate_up, down, layer.ragged_offsets, bits
        )

    def _pack_for_cpu(self, layer: "RoutedExperts") -> None:
        if layer.w13_weight.dtype != torch.bfloat16:
            logger.warning_once(
                "camera-serve: the fast CPU kernel computes in bfloat16; %s runs in plain torch, "
                "slowly. Serve with --dtype bfloat16",
                layer.w13_weight.dtype,
            )
            return
        gate_up = [getattr(layer, f"w13_{part}").data for part in PARTS]
        down = [getattr(layer, f"w2_{part}").data for part in PARTS]
        offsets = layer.ragged_offsets
        rows = _ragged_layer(gate_up, down, offsets, list(self._tiers.bits))
        for number, tier in enumerate(cpu.pack_layer(rows).tiers):
            for name in ("offsets", "gate_up", "down"):
                held = Parameter(getattr(tier, name), requires_grad=False)
                layer.register_parameter(f"camera_{name}_{number}", held)
                self._cpu_tiers.append(held)
        for part in PARTS:
            for name in (f"w13_{part}", f"w2_{part}"):
                getattr(layer, name).data = torch.empty(0)

    def _load(
        self,
        layer: "RoutedExperts",
        part: Part,
        param: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        assert self._loader is not None
        if shard_id == "w2":
            held = RankRows(*(getattr(layer, f"w2_{p}").data for p in PARTS))
        else:
            half = 0 if shard_id == "w1" else 1
            held = RankRows(*(getattr(layer, f"w13_{p}").data[half] for p in PARTS))
        rows = held.by_tier(self._loader.split.num_rows, self._tiers.bits)
        return self._loader.load(rows, loaded_weight, expert_id, _PROJECTIONS[shard_id], part)

    def _split(self, layer: "RoutedExperts") -> RankSplit:
        local_id = layer._map_global_expert_id_to_local_expert_id
        return split_layer(
            self._counts,
            tp_size=self.moe.tp_size,
            tp_rank=self.moe.tp_rank,
            held=[local_id(expert) >= 0 for expert in range(len(self._counts))],
        )

    def _refuse_engine_settings(self) -> None:
        config = get_current_vllm_config()
        if self.moe.moe_parallel_config.enable_eplb:
            raise ServingError(
                "expert load balancing moves experts between equal slots, and the experts of a "
                "CAMERA checkpoint differ in width: start without --enable-eplb"
            )
        if config.lora_config is not None:
            raise ServingError(
                "LoRA adapters are made for experts of the original width: merge the adapter into "
                "the dense model and compress that, or start without --enable-lora"
            )
        graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
        if current_platform.is_cuda_alike() and graphs:
            raise ServingError(
                "this version computes CAMERA experts on the GPU in a loop over experts, which "
                "CUDA graphs cannot capture: start with --enforce-eager"
            )

    def _refuse_layer_settings(self, layer: "RoutedExperts") -> None:
        if layer.activation != MoEActivation.SILU:
            raise ServingError(f"{self._prefix}: activation {layer.activation} is not silu")
        if layer.apply_router_weight_on_input:
            raise ServingError(
                f"{self._prefix}: router weights on the experts' input are not known"
            )
        if layer.global_num_experts != len(self._counts):
            raise ServingError(
                f"{self._prefix}: vLLM wants {layer.global_num_experts} experts, the checkpoint "
                f"has {len(self._counts)}: fused shared or redundant experts are not supported"
            )


def _ragged_layer(
    gate_up: list[torch.Tensor], down: list[torch.Tensor], offsets: torch.Tensor, bits: list[int]
) -> RaggedLayer:
    by_tier = [tuple(row) for row in offsets.tolist()]
    num_rows = [row[-1] for row in by_tier]
    gate, up = (RankRows(*(part[i] for part in gate_up)).by_tier(num_rows, bits) for i in (0, 1))
    rows = zip(gate, up, RankRows(*down).by_tier(num_rows, bits), by_tier, strict=True)
    return RaggedLayer(tuple(RaggedTier(*tier) for tier in rows))


def _ragged_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    offsets: torch.Tensor,
    bits: list[int],
) -> torch.Tensor:
    layer = _ragged_layer(gate_up, down, offsets, bits)
    return ragged_moe(x, top_k_weights, top_k_ids, layer)


def _ragged_moe_shape(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    offsets: torch.Tensor,
    bits: list[int],
) -> torch.Tensor:
    return torch.empty_like(x)


# Opaque, because the loop over experts depends on the routing, which torch.compile cannot trace.
# The offsets are a tensor argument and not looked up by a layer's number: compiled graphs are
# cached across engines, and a number in them could name another engine's layer.
direct_register_custom_op(
    op_name="camera_ragged_moe", op_func=_ragged_moe, fake_impl=_ragged_moe_shape
)


def _cpu_moe(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    tiers: list[torch.Tensor],
    bits: list[int],
    group_size: int,
) -> torch.Tensor:
    layout = zip(bits, tiers[::3], tiers[1::3], tiers[2::3], strict=True)
    layer = cpu.CpuLayer(x.shape[1], group_size, tuple(cpu.CpuTier(*tier) for tier in layout))
    return cpu.ragged_moe(x, top_k_weights, top_k_ids, layer)


def _cpu_moe_shape(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_ids: torch.Tensor,
    tiers: list[torch.Tensor],
    bits: list[int],
    group_size: int,
) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="camera_cpu_moe", op_func=_cpu_moe, fake_impl=_cpu_moe_shape)
