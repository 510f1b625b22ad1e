"""OUT goes in; after `import camera_serve.hf`, transformers' `from_pretrained` loads it."""

from camera_serve.errors import LibraryError, is_missing_from_transformers

try:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer

    from camera_serve.hf.quantizer import CameraHfConfig, CameraHfQuantizer
    from camera_serve.models.registration import register_models
except ImportError as error:
    if not is_missing_from_transformers(error):
        raise
    raise LibraryError.of_transformers(error) from error

from camera_serve.hf.contract import check_overrides

__all__ = ["CameraHfConfig", "CameraHfQuantizer", "register"]


def register() -> None:
    """Teach transformers the method `camera` and the model type `deepseek`; repeatable.

    Raises `LibraryError` for a transformers that calls quantizers in another way.
    """
    check_overrides(CameraHfQuantizer, HfQuantizer)
    register_models()
    if "camera" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("camera")(CameraHfConfig)
        register_quantizer("camera")(CameraHfQuantizer)


register()
