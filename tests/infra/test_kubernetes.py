"""Kubernetes and KubeRay objects of infra/: schemas, and what they do not see (limits, rights, secrets, commands)."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

import kubernetes_validate
import pytest
import typer.testing

from jobs import cli, pipeline
from jobs.config import load_experiment
from tests.infra.files import DIGEST, INFRA, KUBERNETES_FILES, ROOT, cluster_specs, documents, objects, pods
from tests.infra.kuberay_schema import KUBERNETES_VERSION, problems

SECRET = re.compile(r"password|secret|token|access_key|credential", re.IGNORECASE)
JOBS = [document for _, document in objects() if document["kind"] == "RayJob"]


def named(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def containers() -> list[tuple[str, dict[str, Any]]]:
    """Every container with a name to report; Ray's autoscaler, which KubeRay adds, counts as one."""
    found = [
        (f"{name}/{c['name']}", c) for name, pod in pods() for c in pod["containers"] + pod.get("initContainers", [])
    ]
    for path, _, spec in cluster_specs():
        found.append((f"{path.name}: autoscaler", {"image": f"@{DIGEST}", **spec["autoscalerOptions"]}))
    return found


@pytest.mark.parametrize("document", [document for _, document in objects()], ids=named)
def test_objects_keep_to_their_schemas(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        assert not list(problems(document))
    else:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_schemas_refuse_what_kuberay_would() -> None:
    job = copy.deepcopy(JOBS[0])
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    job["spec"]["submissionMode"] = "HttpMode"
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    found = "\n".join(problems(job))
    for part in (
        "'maxReplica' was unexpected",
        "'imagePullPolice' was unexpected",
        "'HttpMode'",
        "'groupName' is a requi",
    ):
        assert part in found


@pytest.mark.parametrize(("name", "container"), containers(), ids=lambda value: value if isinstance(value, str) else "")
def test_containers_have_bounds_no_rights_and_a_pinned_image(name: str, container: dict[str, Any]) -> None:
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(container["resources"][kind]), f"{name}: {kind}"
    assert container["image"].endswith(f"@{DIGEST}"), f"{name}: {container['image']}"
    rights = container["securityContext"]
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["privileged"] is False
    assert rights["runAsNonRoot"] is True
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_run_as_a_user_and_see_kubernetes_only_where_they_must(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    if not name.endswith(": head"):
        assert pod["automountServiceAccountToken"] is False


def test_secrets_come_by_reference() -> None:
    assert not [named(document) for _, document in objects() if document["kind"] == "Secret"]
    for name, container in containers():
        for variable in container.get("env", []):
            assert not (SECRET.search(variable["name"]) and "value" in variable), f"{name}: {variable['name']}"


def test_names_that_objects_say_of_each_other_exist() -> None:
    names = {
        kind: {d["metadata"]["name"] for _, d in objects() if d["kind"] == kind}
        for kind in ("ServiceAccount", "Service")
    }
    assert {pod["serviceAccountName"] for _, pod in pods() if "serviceAccountName" in pod} <= names["ServiceAccount"]
    assert {d["metadata"]["namespace"] for _, d in objects() if d["kind"] != "Namespace"} == {"subcat"}
    text = "".join(path.read_text() for path in KUBERNETES_FILES)
    assert set(re.findall(r"@(\w+):\d+/", text)) | set(re.findall(r"//(\w+)\.subcat\.svc", text)) <= names["Service"]
    policies = {d["metadata"]["name"]: d["spec"]["podSelector"] for _, d in objects() if d["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {}
    assert set(policies) == {"deny-all", "ray-nodes", "mlflow", "postgres"}


@pytest.mark.parametrize("path", [path for path, _, _ in cluster_specs()], ids=lambda path: path.name)
def test_clusters_want_a_token_and_the_installed_ray(path: Any) -> None:
    ((_, document, spec),) = [found for found in cluster_specs() if found[0] == path]
    assert spec["authOptions"] == {"mode": "token", "secretName": "subcat-ray-token"}
    assert f"\nray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])
    if document["kind"] == "RayJob":
        assert document["spec"]["shutdownAfterJobFinishes"] is True
        assert document["spec"]["activeDeadlineSeconds"] > 0


@pytest.mark.parametrize("document", JOBS, ids=named)
def test_jobs_name_commands_options_and_settings_that_exist(document: dict[str, Any], monkeypatch: Any) -> None:
    """The entrypoint is parsed by the command line itself, its work replaced by a look at what arrived."""
    words = shlex.split(document["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs"]
    seen: list[Any] = []
    monkeypatch.setattr(cli, "execute", lambda experiment, **_: seen.append(experiment))
    monkeypatch.setattr(
        cli, "with_ray", lambda settings, needed, *_: seen.append(needed) or {"num_images": 0, "num_bad": 0, "bad": []}
    )
    monkeypatch.setattr(cli, "list_images", lambda uri: [])
    words = [word.replace("/app/", f"{ROOT}/") for word in words[3:]]
    result = typer.testing.CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    assert len(seen) == 1


@pytest.mark.parametrize("document", JOBS, ids=named)
def test_jobs_fit_the_machines_they_may_have(document: dict[str, Any]) -> None:
    groups = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [
        (group["maxReplicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in groups
    ]
    gpus = sum(count * float(each.get("nvidia.com/gpu", 0)) for count, each in limits)
    cpus = sum(count * float(each["cpu"]) for count, each in limits)
    words = shlex.split(document["spec"]["entrypoint"])
    if words[3] == "run":
        settings = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
        experiment = load_experiment(words[4].replace("/app/", f"{ROOT}/"), settings)
        stream, compute = experiment.stream, experiment.classifier.compute
        assert stream.num_actors * stream.gpus_per_actor <= gpus
        assert stream.num_actors * stream.cpus_per_actor < cpus
        if gpus:
            assert compute.num_workers * compute.gpus_per_worker <= gpus
            assert compute.num_workers * compute.cpus_per_worker < cpus
    else:
        assert float(words[words.index("--num-actors") + 1]) * float(words[words.index("--gpus-per-actor") + 1]) <= gpus
    assert "--stage" not in words or words[words.index("--stage") + 1] in pipeline.STAGES


def test_mlflow_in_the_cluster_has_the_users_of_its_image() -> None:
    (config,) = [d for d in documents(INFRA / "mlflow" / "kubernetes.yaml") if d["kind"] == "ConfigMap"]
    lines = [
        line for line in (INFRA / "mlflow" / "basic-auth.ini").read_text().splitlines() if not line.startswith(";")
    ]
    assert config["data"]["basic-auth.ini"].split() == "\n".join(lines).split()
