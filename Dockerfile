# vLLM's own image for NVIDIA GPUs with camera-serve beside it: `vllm serve OUT` needs no flag.
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}

COPY pyproject.toml README.md LICENSE /opt/camera-serve/
COPY camera_serve /opt/camera-serve/camera_serve
COPY converters /opt/camera-serve/converters

# --no-deps: the image's torch, transformers and vLLM are the ones vLLM was built for; the rest of
# our dependencies are vLLM's own as well.
RUN python3 -m pip install --no-cache-dir --no-deps /opt/camera-serve \
 && python3 -c "import click, pydantic, rich, safetensors, yaml; import camera_serve" \
 && useradd --create-home camera

USER camera
WORKDIR /home/camera
ENV HF_HOME=/home/camera/.cache/huggingface
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
