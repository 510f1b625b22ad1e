"""vLLM gives model types that it reads as DeepSeek-V3 that class, and the class their name."""

import pytest
from transformers import CONFIG_MAPPING, DeepseekV3Config


@pytest.fixture(autouse=True)
def _transformers_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    monkeypatch.setattr(DeepseekV3Config, "model_type", DeepseekV3Config.model_type)
