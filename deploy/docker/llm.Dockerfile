# syntax=docker/dockerfile:1
# The LLM service. flash-attn is compiled for one GPU and one torch: add its wheel in an image of your own.
#   docker build -f deploy/docker/llm.Dockerfile -t internvl-serving/llm:0.1.0 .
# For the same image tomorrow, give the base by its digest: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
# Compiles the kernel that decodes on CPUs with matrix units.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/internvl
COPY constraints.txt ./
# torch is by far the largest part, and its version decides what the rest may be. Its index decides for which hardware: the
# package index has the build for NVIDIA's GPUs, https://download.pytorch.org/whl/cpu the one for CPUs.
ARG TORCH_INDEX=https://pypi.org/simple
RUN /opt/internvl/bin/pip install -c constraints.txt --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY shared shared
COPY gateway gateway
COPY vision_service vision_service
COPY llm_service llm_service
COPY internvl_client internvl_client
COPY deploy deploy
COPY protos/gen protos/gen
RUN /opt/internvl/bin/pip install -c constraints.txt ".[llm,tracing]"

FROM ${PYTHON}
LABEL org.opencontainers.image.title="internvl-serving llm" org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin internvl
COPY --from=build /opt/internvl /opt/internvl
ENV PATH=/opt/internvl/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torch
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "llm_service"]
