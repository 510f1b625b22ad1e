"""OUT goes in; what vLLM serves comes out: its plugin, entry point `register`, without a flag."""

import logging
import re

from camera_serve.errors import ServingError

OLDEST, NEWEST = (0, 26), (0, 33)
"""The vLLM versions this plugin was tested with, both included."""

_logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the quantization method `camera` and the model type `deepseek`; repeatable.

    Called by vLLM in every one of its processes. A vLLM newer than those tested is asked whether it
    keeps what the plugin takes for granted (`contract`). Where it does not, and where vLLM is too
    old, other models go on working, and a CAMERA checkpoint is refused with what is wrong.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if problem := version_problem(vllm.__version__):
        _logger.warning(problem)
        register_quantization_config("camera")(_refusing(QuantizationConfig, problem))
        return
    if is_untested(vllm.__version__):
        _logger.warning(
            "camera-serve was tested with vLLM up to %d.%d, and this is %s: all that it relies on "
            "is still there, so it goes on",
            *NEWEST,
            vllm.__version__,
        )
    from camera_serve.models.deepseek import register_deepseek
    from camera_serve.vllm_plugin.config import CameraConfig

    register_quantization_config("camera")(CameraConfig)
    register_deepseek()


def version_problem(version: str) -> str | None:
    """Why this vLLM version cannot serve CAMERA checkpoints; None when it can."""
    remedy = f"install 'vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    if (found := _parsed(version)) is None or found < OLDEST:
        return (
            f"CAMERA checkpoints are served by vLLM {OLDEST[0]}.{OLDEST[1]} and newer, and this is "
            f"vLLM {version}: {remedy}"
        )
    if found <= NEWEST:
        return None
    if changed := _changes():
        return (
            f"vLLM {version} is newer than this camera-serve, which was tested up to "
            f"{NEWEST[0]}.{NEWEST[1]}, and has changed what it relies on: {'; '.join(changed)}. "
            f"Update camera-serve, or {remedy}"
        )
    return None


def is_untested(version: str) -> bool:
    """Whether this vLLM version is newer than any that was tested."""
    found = _parsed(version)
    return found is not None and found > NEWEST


def _parsed(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _changes() -> list[str]:
    """What a newer vLLM no longer keeps; the plugin may not even import."""
    try:
        from camera_serve.vllm_plugin.contract import broken_items

        return list(broken_items())
    except Exception as error:
        # Whatever it is that the plugin's own modules trip over at import.
        return [f"the plugin does not load ({type(error).__name__}: {error})"]


def _refusing(base: type, problem: str) -> type:
    def from_config(cls: type, config: dict[str, object]) -> object:
        raise ServingError(problem)

    return type("RefusedCameraConfig", (base,), {"from_config": classmethod(from_config)})
