# The MLflow server: basic auth, runs in PostgreSQL, artifacts in S3.
#   infra/images/build.sh REGISTRY        builds and pushes all images, with the base pinned by its digest
# Nothing secret is inside: passwords and keys come from the environment (infra/mlflow).
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ARG BASE_IMAGE
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN [[ "${BASE_IMAGE}" =~ @sha256:[0-9a-f]{64}$ ]] || { echo "BASE_IMAGE=${BASE_IMAGE}: give it with @sha256:..." >&2; exit 1; }
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --uid 1000 --user-group --create-home mlflow
COPY constraints.txt infra/images/mlflow-requirements.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --constraint /build/constraints.txt --requirement /build/mlflow-requirements.txt
COPY infra/mlflow/basic-auth.ini /etc/mlflow/basic-auth.ini
ENV PATH=/opt/venv/bin:$PATH \
    MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic-auth.ini
WORKDIR /home/mlflow
USER 1000:1000
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["wget", "-q", "-T", "5", "-O", "/dev/null", "http://127.0.0.1:5000/health"]
CMD ["mlflow", "server", "--app-name", "basic-auth", "--host", "0.0.0.0", "--port", "5000"]
