# A Ray node with GPUs, or one without that shares its image: head, workers and `ray job submit` alike.
#   infra/images/build.sh REGISTRY        builds and pushes all images, with the base pinned by its digest
# By hand: docker build -f infra/images/gpu.Dockerfile --build-arg BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:... .
# "base" holds the CUDA runtime (cudart); cuBLAS, cuDNN and NCCL come with torch's wheels, so "runtime" would bring them twice.
# BASE_IMAGE has no default, since a digest has to be looked up where the registry can be reached.
ARG BASE_IMAGE

FROM ${BASE_IMAGE} AS python
ARG BASE_IMAGE
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN [[ "${BASE_IMAGE}" =~ @sha256:[0-9a-f]{64}$ ]] || { echo "BASE_IMAGE=${BASE_IMAGE}: give it with @sha256:..." >&2; exit 1; }
# wget: KubeRay's probes and the health check below; rsync: Ray's cluster launcher.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/*

# All that is large and seldom changes: rebuilt only when pyproject.toml or constraints.txt do.
FROM python AS dependencies
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir --parents subcat_core cluster jobs/importers && touch README.md LICENSE \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --constraint constraints.txt ".[weights,launcher]" \
    && /opt/venv/bin/pip uninstall --yes subcat

FROM python AS node
# The number is what Kubernetes' runAsUser and the first user of cloud machines have, so mounted files can be read.
RUN (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash subcat \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/subcat.sh
COPY --from=dependencies /opt/venv /opt/venv
# A job's own working directory stands before /app, so submitted code wins over the image's.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /app
COPY configs ./configs
COPY subcat_core ./subcat_core
COPY cluster ./cluster
COPY jobs ./jobs
USER 1000:1000
# The raylet of this node, by the agent that `ray start` brings; Kubernetes takes KubeRay's own probes instead.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["/bin/bash", "-c", "wget -q -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success"]
CMD ["python", "-m", "jobs", "--help"]
