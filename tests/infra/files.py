"""The files of infra/ as the checks see them: filled in with made-up values by infra/fill.sh itself, and parsed."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DIGEST = "sha256:" + "0123456789abcdef" * 4
VALUES = {
    "SUBCAT_CONFIG": "/app/configs/voc12.toml",
    "SUBCAT_OUTPUT": "s3://bucket/runs/first",
    "SUBCAT_IMAGES": "s3://bucket/images.parquet",
    "SUBCAT_PREDICTIONS": "s3://bucket/predictions",
    "STORAGE_REGION": "us-east-1",
    "STORAGE_ENDPOINT": "https://s3.us-east-1.amazonaws.com",
    "MLFLOW_ARTIFACTS": "s3://bucket/mlflow",
    "AWS_REGION": "us-east-1",
    "AWS_IMAGE_ID": "ami-0123456789abcdef0",
    "AWS_INSTANCE_PROFILE": "arn:aws:iam::123456789012:instance-profile/subcat",
    "GCP_PROJECT": "project",
    "GCP_ZONE": "us-central1-a",
    "GCP_SERVICE_ACCOUNT": "subcat@project.iam.gserviceaccount.com",
    "GCP_BOOT_DISK": "projects/some/global/images/one",
}
IMAGES = ("SUBCAT_GPU_IMAGE", "SUBCAT_CPU_IMAGE", "MLFLOW_IMAGE", "POSTGRES_IMAGE", "S3_IMAGE")
VALUES |= {name: f"registry.example/{name.lower()}@{DIGEST}" for name in IMAGES}
YAML_FILES = sorted(INFRA.rglob("*.yaml"))
KUBERNETES_FILES = [*sorted((INFRA / "kuberay").glob("*.yaml")), INFRA / "mlflow" / "kubernetes.yaml"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def program(name: str) -> str:
    """Path of a linter that `make install` brings. A missing one fails the check: a skipped check would say nothing."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; `make install` brings it"
    return found


def run(*command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), text=True, capture_output=True, check=False)


def write_site(folder: Path, **changed: str) -> Path:
    """site.env with all values, or with some changed; None-like empty values are left unset, as in the example."""
    path = folder / "site.env"
    path.write_text("".join(f"{name}={value}\n" for name, value in (VALUES | changed).items()))
    return path


def filled(path: Path) -> str:
    """The file as infra/fill.sh prints it, by the same rule: ${NAME} alone, values as they are."""
    return re.sub(r"\$\{([A-Z][A-Z0-9_]*)\}", lambda match: VALUES[match.group(1)], path.read_text())


@functools.cache
def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(filled(path)) if document is not None]


def objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object with its file."""
    for path in KUBERNETES_FILES:
        for document in documents(path):
            yield path, document


def cluster_specs() -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """File, object and RayClusterSpec of every KubeRay object."""
    for path, document in objects():
        if document["apiVersion"] == "ray.io/v1":
            yield path, document, document["spec"].get("rayClusterSpec", document["spec"])


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name to report, and the PodSpec, of every pod that an object brings."""
    for path, document in objects():
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield f"{relative(path)}: {document['metadata']['name']}", document["spec"]["template"]["spec"]
    for path, _, spec in cluster_specs():
        yield f"{relative(path)}: head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{relative(path)}: {group['groupName']}", group["template"]["spec"]
