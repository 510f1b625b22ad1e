"""Speed of models in vLLM, end to end: real servers and vLLM's own benchmark commands."""
