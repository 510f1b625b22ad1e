"""The quantization method `camera` of vLLM: which layers are ragged, and who builds them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from camera_serve.checkpoint.format import LOST, CameraQuantizationConfig
from camera_serve.checkpoint.reader import load_config, read_json
from camera_serve.errors import CheckpointError, ServingError, quoted
from camera_serve.models import MoeStructure, describe
from camera_serve.vllm_plugin import contract
from camera_serve.vllm_plugin.compat import hub_shapes
from camera_serve.vllm_plugin.drafts import DRAFT_MODEL, draft_layers, why_no_draft
from camera_serve.vllm_plugin.linear import SharedDownMethod, SharedGateUpMethod
from camera_serve.vllm_plugin.loading import TierCounts, check_folder, check_hub_model
from camera_serve.vllm_plugin.moe import CameraMoEMethod
from camera_serve.vllm_plugin.packed_shared import (
    PackedDownMethod,
    PackedGateUpMethod,
    PackedSharedExpert,
)
from camera_serve.vllm_plugin.refusals import (
    refuse_method,
    refuse_overrides,
    refuse_settings,
)
from camera_serve.vllm_plugin.trial import try_layer

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class CameraConfig(QuantizationConfig):
    """What `quantization_config` says, as vLLM asks for it. Pickled into every worker."""

    def __init__(self, quantization: CameraQuantizationConfig | None = None) -> None:
        super().__init__()
        if quantization is None:
            # As vLLM does for `--quantization camera` with a model that is not quantized.
            raise ServingError(
                "--quantization camera: config.json has no quantization_config of CAMERA: compress "
                "the model first (camera-serve compress), then start without --quantization"
            )
        self.quantization = quantization
        self._structure: MoeStructure | None = None
        self._served_names: dict[str, str] = {}
        self._draft_layers: frozenset[str] | None = frozenset()
        self._half_built: dict[str, PackedSharedExpert] = {}

    @classmethod
    def get_name(cls) -> str:
        """`camera`, the `quant_method` of the checkpoints."""
        return "camera"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes the kernels compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest GPU with bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CameraConfig":
        """Validate `quantization_config`; raises `CheckpointError` that names the key at fault.

        And `ServingError` where a vLLM newer than the tested ones has changed what this relies on.
        """
        contract.require(vllm.__version__)
        if "layers" not in config:
            raise CheckpointError(LOST)
        return cls(CameraQuantizationConfig.parse(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, *_: Any, **__: Any
    ) -> None:
        """None: no other method becomes ours; raises `ServingError` where `--quantization` differs.

        vLLM asks this for every quantized model, so it takes whatever arguments there may be.
        """
        refuse_method(user_quant, hf_quant_cfg.get("quant_method"))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PreTrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Compare counts, tensor names and shapes with the model, before anything is allocated.

        Raises `CheckpointError`, `ServingError` or `UnsupportedModelError`, which stop the server.
        """
        if hf_config is None:
            raise CheckpointError(f"{model_name} gives vLLM no Hugging Face config.json")
        structure = self._structure = describe(hf_config)
        folder = Path(model_name)
        with _remedy(model_name):
            if folder.is_dir():
                stored = describe(load_config(folder, read_json(folder / "config.json")))
                refuse_overrides(structure, stored, model_name)
            self.quantization.check(structure)
            if folder.is_dir():
                carried = check_folder(folder)
            else:
                found = hub_shapes(model_name, revision)
                carried = check_hub_model(
                    model_name, hf_config, structure, self.quantization, found
                )
        self._draft_layers = None if carried is None else draft_layers(carried)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ragged methods for routed and shared experts, vLLM's own for all other layers.

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
        if not isinstance(layer, LinearBase):
            return None
        module, _, linear = prefix.rpartition(".")
        served, _, name = module.rpartition(".")
        stored = self._stored_name(served)
        if stored and name == self._moe.shared_expert_name:
            return self._shared_method(stored, module, linear)
        return UnquantizedLinearMethod()

    @property
    def _moe(self) -> MoeStructure:
        assert self._structure is not None, "vLLM builds layers before it has shown their config"
        return self._structure

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Find layers by vLLM's names, which differ from the checkpoint's where a text stack is
        nested; vLLM calls this before it builds the model.
        """
        self._served_names |= {
            served: stored
            for stored in self.quantization.layers
            for served in hf_to_vllm_mapper.apply_list([stored])
        }

    def _stored_name(self, served: str) -> str | None:
        """The layout's name of what vLLM calls this MoE layer; None for one it does not list."""
        name = self._served_names.get(served, served)
        return name if name in self.quantization.layers else None

    def _shared_method(self, moe_prefix: str, module: str, linear: str) -> LinearMethodBase:
        shared = self.quantization.layout(moe_prefix).shared
        if linear not in ("gate_up_proj", "down_proj"):
            raise ServingError(
                f"vLLM builds a shared expert out of {module}.{linear}, wanted gate_up_proj and "
                "down_proj: start without --model-impl and --model-class-overrides"
            )
        if min(self.quantization.bits) < 16:
            packed = PackedDownMethod if linear == "down_proj" else PackedGateUpMethod
            return packed(self._packed_shared(shared, module))
        method = SharedDownMethod if linear == "down_proj" else SharedGateUpMethod
        return method(shared, module)

    def _packed_shared(self, counts: TierCounts, module: str) -> PackedSharedExpert:
        """The MLP of a linear layer: made for the first of its two, and the second's as well."""
        expert = self._half_built.pop(module, None)
        if expert is None:
            expert = PackedSharedExpert(counts, self.quantization.tiers, module)
            self._half_built[module] = expert
        return expert

    def _require_draft(self, moe_prefix: str) -> None:
        config, num_layers = get_current_vllm_config(), self._moe.num_layers
        if reason := why_no_draft(moe_prefix, num_layers, self._draft_layers, config):
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
        layer_number = self._moe.layer_of(stored)
        assert layer_number is not None, "the layout was compared with the model"
        name = partial(self._moe.expert_prefix, layer_number)
        counts = self.quantization.layout(stored).experts
        return CameraMoEMethod(layer.moe_config, counts, self.quantization.tiers, moe_prefix, name)


@contextmanager
def _remedy(model: str) -> Iterator[None]:
    """Say what to do about a damaged checkpoint, on the last line a server prints."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. The checkpoint is damaged or was edited: copy it again, or compress the "
            f"model again (`camera-serve verify {quoted(model)}` checks a copy)"
        ) from None
