"""OUT goes in; after `import camera_serve.hf`, transformers' `from_pretrained` loads it."""

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from camera_serve.hf.quantizer import CameraHfConfig, CameraHfQuantizer
from camera_serve.models.deepseek import register_deepseek

__all__ = ["CameraHfConfig", "CameraHfQuantizer", "register"]


def register() -> None:
    """Teach transformers the method `camera` and the model type `deepseek`; repeatable."""
    register_deepseek()
    if "camera" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("camera")(CameraHfConfig)
        register_quantizer("camera")(CameraHfQuantizer)


register()
