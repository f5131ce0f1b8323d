"""JSON schemas of KubeRay's RayJob and RayCluster (ray.io/v1), as far as infra/ could use them, from its API reference.

No package brings the schemas of KubeRay's own definitions, so the fields stand here by hand: those of KubeRay 1.6,
without the deprecated ones, GCS fault tolerance and what only Kueue sets. Unknown fields are refused, as `kubectl` does
with --validate=strict. Pod templates, containers' parts and services are checked by Kubernetes' own schemas, which
kubernetes-validate brings; the references below point into them.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
from referencing import Registry, Resource

KUBERNETES_VERSION = "1.33"  # the oldest that is still served by the clouds
_BASE = "https://kubernetes.io"
_CORE = f"{_BASE}/api/_definitions.json#/$defs/io.k8s.api.core.v1"
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_BOOL = {"type": "boolean"}
_TEXT = {"type": "string"}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _core(name: str) -> dict[str, str]:
    return {"$ref": f"{_CORE}.{name}"}


_HEAD = _object(
    ("template",),
    template=_core("PodTemplateSpec"),
    headService=_core("Service"),
    enableIngress=_BOOL,
    labels=_TEXTS,
    resources=_TEXTS,
    rayStartParams=_TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)
_GROUP = _object(
    ("groupName", "template"),
    groupName={"type": "string", "minLength": 1},
    template=_core("PodTemplateSpec"),
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=_COUNT,
    labels=_TEXTS,
    resources=_TEXTS,
    rayStartParams=_TEXTS,
    scaleStrategy=_object(workersToDelete={"type": "array", "items": _TEXT}),
    suspend=_BOOL,
)
_AUTOSCALER = _object(
    version={"enum": ["v1", "v2"]},
    resources=_core("ResourceRequirements"),
    image=_TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    securityContext=_core("SecurityContext"),
    idleTimeoutSeconds=_COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    env={"type": "array", "items": _core("EnvVar")},
    envFrom={"type": "array", "items": _core("EnvFromSource")},
    volumeMounts={"type": "array", "items": _core("VolumeMount")},
)
_CLUSTER = _object(
    ("headGroupSpec",),
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_TEXT, enableK8sTokenAuth=_BOOL),
    suspend=_BOOL,
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=_TEXTS,
    enableInTreeAutoscaling=_BOOL,
    headGroupSpec=_HEAD,
    rayVersion=_TEXT,
    workerGroupSpecs={"type": "array", "items": _GROUP},
)
_JOB = _object(
    ("entrypoint",),
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    rayClusterSpec=_CLUSTER,
    submitterPodTemplate=_core("PodTemplateSpec"),
    metadata=_TEXTS,
    clusterSelector=_TEXTS,
    submitterConfig=_object(backoffLimit=_COUNT),
    entrypoint={"type": "string", "minLength": 1},
    runtimeEnvYAML=_TEXT,
    jobId=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=_TEXT,
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    ttlSecondsAfterFinished=_COUNT,
    shutdownAfterJobFinishes=_BOOL,
    suspend=_BOOL,
)
_SPECS = {"RayCluster": _CLUSTER, "RayJob": _JOB}


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    definitions = folder / f"v{KUBERNETES_VERSION}.0-local-strict" / "_definitions.json"
    registry: Registry[Any] = Resource.from_contents(json.loads(definitions.read_text())) @ Registry()
    schema = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"$ref": f"{_BASE}/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        spec=_SPECS[kind],
    )
    return jsonschema.Draft202012Validator(schema, registry=registry)


def problems(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a RayJob or RayCluster, each with the path to it."""
    for error in _validator(document["kind"]).iter_errors(document):
        yield f"{error.json_path}: {error.message}"
