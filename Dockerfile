# The image of `quiver serve`, `quiver train` and the client: no root, no pip, no compiler (but for the CUDA one).
#
#   docker build -t REGISTRY/quiver:0.1.0 .
#   docker build -t REGISTRY/quiver:0.1.0-cuda --target cuda \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# For the same bytes again, name the base image by its digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# PyPI's torch for Linux brings gigabytes of CUDA libraries; this index has the build for CPUs. Empty: pip's own index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
# Debian's g++, of the base image's own release.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /build
COPY .ci/constraints.txt pyproject.toml README.md LICENSE ./
COPY proto proto
COPY peft peft
COPY server server
COPY trainer/quiver_trainer trainer/quiver_trainer
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[server,stores,http,otel,trainer,megatron]' \
 && XDG_CACHE_HOME=/opt/quiver/cache /opt/venv/bin/python -c \
    'from quiver_peft.kernels.cpp.build import built_for_every_machine; built_for_every_machine()' \
 && chmod -R a+rX /opt/quiver/cache \
 && /opt/venv/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS run
COPY --from=build /opt/venv /opt/venv
# The CPU kernels, compiled above for every instruction set they know.
COPY --from=build /opt/quiver/cache /opt/quiver/cache
# A base of 2 M parameters to try a release with.
COPY trainer/demo/base /opt/quiver/demo-base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/opt/quiver/cache
# Kubernetes checks a number, not a name, against runAsNonRoot.
USER 10001:10001
EXPOSE 50051 9464
ENTRYPOINT ["quiver"]
CMD ["--help"]

FROM run AS cuda
USER 0
# Triton compiles the launchers of its kernels when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001

# The last one is what is built by default.
FROM run AS cpu
