"""Models go in; how fast vLLM serves them comes out: real servers and its own bench commands."""
