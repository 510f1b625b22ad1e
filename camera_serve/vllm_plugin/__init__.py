"""OUT goes in; what vLLM serves comes out: its plugin, entry point `register`, without a flag."""

import logging
import re

from camera_serve.errors import ServingError

OLDEST, NEWEST = (0, 26), (0, 33)
"""The vLLM versions this plugin knows, both included."""

_logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the quantization method `camera` and the model type `deepseek`; repeatable.

    Called by vLLM in every one of its processes. With a vLLM outside the supported window, other
    models go on working, and a CAMERA checkpoint is refused with a message that says so.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if problem := version_problem(vllm.__version__):
        _logger.warning(problem)
        register_quantization_config("camera")(_refusing(QuantizationConfig, problem))
        return
    from camera_serve.models.deepseek import register_deepseek
    from camera_serve.vllm_plugin.config import CameraConfig

    register_quantization_config("camera")(CameraConfig)
    register_deepseek()


def version_problem(version: str) -> str | None:
    """Why this vLLM version cannot serve CAMERA checkpoints; None when it can."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    window = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return (
        f"CAMERA checkpoints are served by vLLM {window}, and this is vLLM {version}: install "
        f"'vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    )


def _refusing(base: type, problem: str) -> type:
    def from_config(cls: type, config: dict[str, object]) -> object:
        raise ServingError(problem)

    return type("RefusedCameraConfig", (base,), {"from_config": classmethod(from_config)})
