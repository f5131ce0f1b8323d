#!/usr/bin/env bash
# Build and push the images of this folder; print them by digest, as infra/site.env wants them.
#   infra/images/build.sh REGISTRY [TAG]
# The base images are resolved to their digests first, so an image says for ever what it was made from.
# Wants: docker with buildx, logged in at REGISTRY. Platform linux/amd64 (faiss-gpu has no other wheels).
set -euo pipefail
cd "$(dirname "$0")/../.."

registry=${1:?usage: infra/images/build.sh REGISTRY [TAG]}
tag=${2:-$(git rev-parse --short=12 HEAD)}

build() { # variable, name, Dockerfile, base image, further arguments of docker
  local variable=$1 name=$2 dockerfile=$3 base=$4 digest metadata
  shift 4
  digest=$(docker buildx imagetools inspect "$base" --format '{{.Manifest.Digest}}')
  metadata=$(mktemp)
  docker buildx build --platform linux/amd64 --push --metadata-file "$metadata" \
    --file "$dockerfile" --build-arg "BASE_IMAGE=$base@$digest" --tag "$registry/$name:$tag" "$@" . >&2
  digest=$(sed -n 's/.*"containerimage.digest": *"\(sha256:[0-9a-f]\{64\}\)".*/\1/p' "$metadata" | head -n 1)
  rm -f "$metadata"
  [[ -n $digest ]] || { echo "error: no digest of $registry/$name:$tag came back from docker" >&2; exit 1; }
  echo "$variable=$registry/$name@$digest"
}

build SUBCAT_GPU_IMAGE subcat-gpu infra/images/gpu.Dockerfile nvidia/cuda:13.0.2-base-ubuntu24.04
build SUBCAT_CPU_IMAGE subcat-cpu infra/images/cpu.Dockerfile ubuntu:24.04 --build-arg "TORCH_INDEX=${TORCH_INDEX:-}"
build MLFLOW_IMAGE subcat-mlflow infra/images/mlflow.Dockerfile ubuntu:24.04

for pair in POSTGRES_IMAGE=postgres:17.6-bookworm S3_IMAGE=rclone/rclone:1.75.2; do
  image=${pair#*=}
  echo "${pair%%=*}=$image@$(docker buildx imagetools inspect "$image" --format '{{.Manifest.Digest}}')"
done
