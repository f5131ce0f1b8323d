# A Ray node without GPUs: spot workers for masks, heads, small jobs.
#   infra/images/build.sh REGISTRY        builds and pushes all images, with the base pinned by its digest
# By hand: docker build -f infra/images/cpu.Dockerfile --build-arg BASE_IMAGE=ubuntu:24.04@sha256:... .
# The default wheels of torch carry CUDA's libraries, some 5 GB. TORCH_INDEX names PyTorch's own index of CPU wheels, which
# come without; the versions of constraints.txt hold for both.
ARG BASE_IMAGE

FROM ${BASE_IMAGE} AS python
ARG BASE_IMAGE
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN [[ "${BASE_IMAGE}" =~ @sha256:[0-9a-f]{64}$ ]] || { echo "BASE_IMAGE=${BASE_IMAGE}: give it with @sha256:..." >&2; exit 1; }
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/*

FROM python AS dependencies
ARG TORCH_INDEX=""
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir --parents subcat_core cluster jobs/importers && touch README.md LICENSE \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[weights,launcher]" \
    && /opt/venv/bin/pip uninstall --yes subcat

FROM python AS node
RUN (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash subcat \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/subcat.sh
COPY --from=dependencies /opt/venv /opt/venv
# CUDA_VISIBLE_DEVICES is empty: on a machine that has a GPU all the same, no process of this image takes it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    CUDA_VISIBLE_DEVICES=""
WORKDIR /app
COPY configs ./configs
COPY subcat_core ./subcat_core
COPY cluster ./cluster
COPY jobs ./jobs
USER 1000:1000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["/bin/bash", "-c", "wget -q -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success"]
CMD ["python", "-m", "jobs", "--help"]
