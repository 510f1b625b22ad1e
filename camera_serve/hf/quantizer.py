"""The quantizer of the method `camera`: how `from_pretrained` loads a compressed checkpoint."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from camera_serve.checkpoint.format import CameraQuantizationConfig
from camera_serve.checkpoint.kept import weights_of
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from camera_serve.hf.experts import add_experts, remove_experts

logger = logging.get_logger(__name__)


class CameraHfConfig(QuantizationConfigMixin):
    """`CameraQuantizationConfig` in the form transformers passes around."""

    quant_method = "camera"

    def __init__(self, settings: CameraQuantizationConfig) -> None:
        self.settings = settings

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Parse config.json's `quantization_config`; raises `CheckpointError`."""
        return cls(CameraQuantizationConfig.parse(config_dict))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object as it stands in config.json."""
        return self.settings.model_dump(mode="json", exclude_none=True)


class CameraHfQuantizer(HfQuantizer):
    """Loads a compressed checkpoint as ragged experts and narrower shared experts."""

    quantization_config: CameraHfConfig
    checkpoint: Checkpoint

    def __init__(self, quantization_config: CameraHfConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtypes: dict[str, torch.dtype] = {}
        # Stored in FP8: transformers reads their codes, and not their scales.
        self._kept = weights_of(quantization_config.settings.outside_experts)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise CheckpointError(
                "a camera model is loaded from its checkpoint folder only: pass the folder to "
                "from_pretrained, without state_dict"
            )
        # transformers does not compare shapes when a quantizer is present, and only warns of
        # missing tensors.
        self.checkpoint = Checkpoint.open(Path(checkpoint_files[0]).parent)
        structure = self.checkpoint.structure
        ours = [re.escape(name) for name in remove_experts(model, structure)]
        ours += [rf"{re.escape(structure.to_hf_name(name))}_scale" for name in self._kept]
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | set(ours)
        self._dtypes = {name: param.dtype for name, param in model.named_parameters()}
        return model

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Make the config ours before weights are looked for; transformers up to 5.20 asks here."""
        return _for_ragged_experts(config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same as `update_tp_plan`; transformers from 5.20 on asks here."""
        return _for_ragged_experts(config)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Drop the converters that stack experts of equal width; up to 5.20 without `model`."""
        return [c for c in weight_conversions if not _stacks_experts(c)]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # With a quantizer present, transformers keeps the stored dtype of every renamed tensor.
        for name, param in model.named_parameters():
            param.data = param.data.to(self._dtypes[name])
        for name in self._kept:
            weight = _parameter(model, self.checkpoint.structure.to_hf_name(name))
            weight.data = self.checkpoint.get(name).to(weight)
        self.checkpoint.release()
        add_experts(model, self.checkpoint, model.dtype)
        return model

    def is_serializable(self) -> bool:
        """False: a compressed checkpoint is complete only as `camera-serve compress` wrote it."""
        logger.warning(
            "a camera model is not saved through save_pretrained: copy its checkpoint folder, or "
            "turn it into an ordinary checkpoint with `camera-serve convert --to dense`"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """False: the ragged kernels are for inference."""
        return False


def _parameter(model: PreTrainedModel, name: str) -> torch.nn.Parameter:
    """A parameter by its name in the whole model, which AutoModel loads without its first part."""
    whole = hasattr(model, model.base_model_prefix)
    own = name if whole else name.removeprefix(f"{model.base_model_prefix}.")
    return model.get_parameter(own)


def _for_ragged_experts(config: PreTrainedConfig) -> PreTrainedConfig:
    """Let every file be loaded, and no layer cut: a family's plans cut experts as stacked ones."""
    for part in (config, config.get_text_config()):
        vars(part).pop("transformers_weights", None)
        part.base_model_tp_plan = None
        part.base_model_ep_plan = None
    return config


def _stacks_experts(transform: WeightTransform) -> bool:
    targets = transform.target_patterns
    return isinstance(transform, WeightConverter) and any(".experts." in t for t in targets)
