# The image of `quiver serve`, `quiver train` and the client: no root, no compiler, no pip in the final stage.
#
#   docker build -t REGISTRY/quiver:0.1.0 .
#   docker build -t REGISTRY/quiver:0.1.0-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# For the same bytes again, name the base image by its digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# PyPI's torch for Linux brings gigabytes of CUDA libraries; this index has the build for CPUs. Empty: pip's own index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
WORKDIR /build
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
COPY .ci/constraints.txt pyproject.toml README.md LICENSE ./
COPY proto proto
COPY peft peft
COPY server server
COPY trainer/quiver_trainer trainer/quiver_trainer
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[server,trainer]' \
 && /opt/venv/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
# A base of 2 M parameters to try a release with.
COPY trainer/demo/base /opt/quiver/demo-base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
# Kubernetes checks a number, not a name, against runAsNonRoot.
USER 10001:10001
EXPOSE 50051 9464
ENTRYPOINT ["quiver"]
CMD ["--help"]
