"""OUT goes in; what vLLM serves comes out: its plugin, entry point `register`, without a flag."""

import logging

from camera_serve.errors import ServingError, first_line
from camera_serve.vllm_plugin.contract import refusal, too_old

_logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the quantization method `camera` and the model type `deepseek`; repeatable.

    Called by vLLM in every one of its processes. With a vLLM that is too old, or in which a name is
    gone, other models go on working, and a CAMERA checkpoint is refused with a message that says
    so. What else may have changed in a newer vLLM is looked at when such a checkpoint is opened.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    problem = too_old(vllm.__version__)
    if problem is None:
        try:
            from camera_serve.vllm_plugin.config import CameraConfig
        except Exception as error:  # Whatever a base class may do that nobody has seen yet.
            problem = refusal(vllm.__version__, [first_line(error)])
    if problem is not None:
        _logger.warning(problem)
        register_quantization_config("camera")(_refusing(QuantizationConfig, problem))
        return
    from camera_serve.models.registration import register_configs

    register_quantization_config("camera")(CameraConfig)
    register_configs()


def _refusing(base: type, problem: str) -> type:
    def from_config(cls: type, config: dict[str, object]) -> object:
        raise ServingError(problem)

    return type("RefusedCameraConfig", (base,), {"from_config": classmethod(from_config)})
