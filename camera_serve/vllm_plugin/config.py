"""The quantization method `camera` of vLLM: what a checkpoint says, checked against its model.

vLLM imports this in every process, for models that are not ours as well. What builds layers is in
`methods.py`, which a CAMERA checkpoint imports: vLLM's MoE layers alone take most of a second.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from transformers import PreTrainedConfig
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from camera_serve.checkpoint.format import LOST, CameraQuantizationConfig
from camera_serve.checkpoint.reader import load_config, read_json
from camera_serve.errors import CheckpointError, ServingError, first_line, quoted
from camera_serve.models import MoeStructure, describe
from camera_serve.vllm_plugin import contract
from camera_serve.vllm_plugin.faults import warn_of_faults
from camera_serve.vllm_plugin.loading import StoredNames, check_folder, check_hub_model
from camera_serve.vllm_plugin.refusals import refuse_method, refuse_overrides

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from camera_serve.vllm_plugin.methods import LayerMethods


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
        self._stored: StoredNames | None = StoredNames()

    @classmethod
    def get_name(cls) -> str:
        """`camera`, the `quant_method` of the checkpoints."""
        return "camera"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes the kernels compute in, and vLLM's FP8 layers where there are some."""
        ours = [torch.bfloat16, torch.float16, torch.float32]
        if self.quantization.outside_experts is None:
            return ours
        from camera_serve.vllm_plugin.outside import outside_method

        theirs = outside_method(self.quantization.outside_experts).get_supported_act_dtypes()
        return [dtype for dtype in ours if dtype in theirs]

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

        And `ServingError` where vLLM lacks what this relies on, or a newer one has changed it.
        """
        try:
            import_module("camera_serve.vllm_plugin.methods")
        except Exception as error:  # Whatever a base class may do that nobody has seen yet.
            problem = contract.refusal(vllm.__version__, [first_line(error)])
            raise ServingError(problem) from error
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
        # Some of vLLM's models call a MoE layer as transformers does, and not as the checkpoint.
        layers = structure.moe_layers
        self._served_names |= {structure.moe_module(n): structure.moe_prefix(n) for n in layers}
        folder = Path(model_name)
        with _remedy(model_name):
            if folder.is_dir():
                stored = describe(load_config(folder, read_json(folder / "config.json")))
                refuse_overrides(structure, stored, model_name)
            self.quantization.check(structure)
            if folder.is_dir():
                self._stored = check_folder(folder)
                if self._stored is not None:
                    warn_of_faults(hf_config, folder, on_cpu=current_platform.is_cpu())
            else:
                from camera_serve.vllm_plugin.compat import hub_shapes

                found = hub_shapes(model_name, revision)
                self._stored = check_hub_model(
                    model_name, hf_config, structure, self.quantization, found
                )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ragged methods for routed and shared experts, vLLM's own for all other layers.

        Raises `ServingError` for layers and settings that cannot be served; vLLM has none earlier.
        """
        return self._methods.of(layer, prefix, self.packed_modules_mapping)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Find layers by vLLM's names, which differ from the checkpoint's where a text stack is
        nested; vLLM calls this before it builds the model.
        """
        outside = self.quantization.outside_experts
        self._served_names |= {
            served: stored
            for stored in (
                *self.quantization.layers,
                *(outside.modules if outside else ()),
                *(self._stored.biased | self._stored.unbiased if self._stored else ()),
            )
            for served in hf_to_vllm_mapper.apply_list([stored])
        }

    @cached_property
    def _methods(self) -> "LayerMethods":
        from camera_serve.vllm_plugin.methods import LayerMethods

        assert self._structure is not None, "vLLM builds layers before it has shown their config"
        return LayerMethods(self.quantization, self._structure, self._served_names, self._stored)


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
