# syntax=docker/dockerfile:1
# The gateway: no torch, no model, about 150 MB beside the base.
#   docker build -f deploy/docker/gateway.Dockerfile -t internvl-serving/gateway:0.1.0 .
# For the same image tomorrow, give the base by its digest: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/internvl
COPY constraints.txt ./
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY shared shared
COPY gateway gateway
COPY vision_service vision_service
COPY llm_service llm_service
COPY internvl_client internvl_client
COPY deploy deploy
COPY protos/gen protos/gen
RUN /opt/internvl/bin/pip install -c constraints.txt ".[gateway,tracing]"

FROM ${PYTHON}
LABEL org.opencontainers.image.title="internvl-serving gateway" org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin internvl
COPY --from=build /opt/internvl /opt/internvl
ENV PATH=/opt/internvl/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "gateway"]
