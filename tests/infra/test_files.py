"""Every other file of infra/ by its own program: hadolint, shellcheck, yamllint, docker compose, Ray's launcher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.files import (
    DIGEST,
    IMAGES,
    INFRA,
    KUBERNETES_FILES,
    ROOT,
    VALUES,
    YAML_FILES,
    documents,
    filled,
    program,
    relative,
    run,
    write_site,
)

DOCKERFILES = sorted(INFRA.glob("images/*.Dockerfile"))
SCRIPTS = sorted(INFRA.rglob("*.sh"))
CLUSTERS = sorted(INFRA.glob("ray-clusters/*.yaml"))
COMPOSE = INFRA / "mlflow" / "compose.yaml"
EXAMPLES = sorted(INFRA.rglob("*.env.example"))
REQUIREMENTS = INFRA / "images" / "mlflow-requirements.txt"
OTHERS = [INFRA / "README.md", INFRA / "runtime-env.yaml", INFRA / "mlflow" / "basic-auth.ini", REQUIREMENTS]
# YAML's syntax, doubled keys and cut-off anchors; the style is ours.
YAMLLINT = "{extends: relaxed, rules: {line-length: {max: 130}, anchors: {forbid-unused-anchors: true}}}"


def test_every_file_is_checked_by_some_program() -> None:
    known = {*DOCKERFILES, *SCRIPTS, *CLUSTERS, *KUBERNETES_FILES, COMPOSE, *EXAMPLES, *OTHERS}
    ignored = {INFRA / "site.env", INFRA / "mlflow" / "secrets.env"}
    files = {path for path in INFRA.rglob("*") if path.is_file()} - ignored
    assert sorted(map(relative, files - known)) == []
    assert not list(INFRA.rglob("*.py"))


def test_yaml_is_sound() -> None:
    result = run(program("yamllint"), "--strict", "-d", YAMLLINT, *map(str, YAML_FILES))
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfiles_pass_the_linter() -> None:
    result = run(program("hadolint"), "--failure-threshold", "style", *map(str, DOCKERFILES))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pin_their_base_and_end_as_a_user(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^ARG BASE_IMAGE(.*)$", text, re.MULTILINE) == ["", ""], "a default base would be unpinned"
    assert "@sha256:[0-9a-f]{64}$ ]]" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"
    assert "\nHEALTHCHECK " in text
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert set(re.findall(r"--from=(\w+)", text)) <= set(stages)
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is not let through by .dockerignore"


def test_node_images_differ_only_where_they_must() -> None:
    """What both bring to a node is one text: a change to one that the other lacks is an error."""

    def last_stage(name: str) -> list[str]:
        text = (INFRA / "images" / name).read_text().split("AS node\n")[1]
        return [line.removesuffix(" \\") for line in text.splitlines() if line and not line.startswith("#")]

    gpu, cpu = last_stage("gpu.Dockerfile"), last_stage("cpu.Dockerfile")
    assert [line for line in cpu if line not in gpu] == ['    CUDA_VISIBLE_DEVICES=""']
    assert [line for line in gpu if line not in cpu] == []


def test_the_servers_requirements_are_pinned() -> None:
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = [line.split("[")[0].strip() for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert names
    assert set(names) <= pins


def test_shell_passes_shellcheck() -> None:
    result = run(program("shellcheck"), *map(str, SCRIPTS))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_accepts_cluster_files(path: Path) -> None:
    (config,) = documents(path)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == path.stem
    nodes = prepared["available_node_types"]
    assert nodes[prepared["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(node["max_workers"] for name, node in nodes.items() if name != "head") == prepared["max_workers"]
    images = [
        *prepared["docker"].values(),
        *(node.get("docker", {}).get("worker_image", "") for node in nodes.values()),
    ]
    assert all(str(image).endswith(f"@{DIGEST}") for image in images if "registry.example" in str(image))
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert "/home/subcat/.ray/auth_token" in prepared["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][1]


def test_ray_refuses_a_cluster_file_with_a_wrong_key() -> None:
    (config,) = documents(CLUSTERS[0])
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config | {"max_worker": 2}))


def composed(folder: Path, **environment: str) -> tuple[int, str]:
    site, secrets = write_site(folder), folder / "secrets.env"
    names = re.findall(r"^([A-Z_]+)=$", (INFRA / "mlflow" / "secrets.env.example").read_text(), re.MULTILINE)
    secrets.write_text("".join(f"{name}={environment.get(name, 'made-up-value')}\n" for name in names))
    files = ("--env-file", str(site), "--env-file", str(secrets), "-f", str(COMPOSE), "--profile", "local-storage")
    result = run(program("docker-compose"), *files, "config", "--format", "json")
    return result.returncode, result.stdout if result.returncode == 0 else result.stderr


def test_compose_accepts_its_file(tmp_path: Path) -> None:
    code, output = composed(tmp_path)
    assert code == 0, output
    config: dict[str, Any] = json.loads(output)
    assert set(config["services"]) == {"mlflow", "postgres", "storage"}
    for name, service in config["services"].items():
        assert service["image"].endswith(f"@{DIGEST}"), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 0
        assert {"limits", "reservations"} <= set(service["deploy"]["resources"])
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
    assert "ports" not in config["services"]["postgres"]
    assert list(config["services"]["postgres"]["networks"]) == ["inside"]
    assert config["networks"]["inside"]["internal"] is True
    command = config["services"]["mlflow"]["command"]
    assert "--app-name=basic-auth" in command
    assert not [word for word in command if re.search(r"://[^/@]*:[^/@]*@", word)], (
        "a password in the list of processes"
    )


def test_compose_refuses_an_empty_secret(tmp_path: Path) -> None:
    code, output = composed(tmp_path, MLFLOW_AUTH_ADMIN_PASSWORD="")
    assert code != 0
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" in output


def test_examples_name_what_the_files_use_and_hold_no_value() -> None:
    site = dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", (INFRA / "site.env.example").read_text(), re.MULTILINE))
    used = {
        name for path in (*KUBERNETES_FILES, *CLUSTERS) for name in re.findall(r"\$\{([A-Z0-9_]+)\}", path.read_text())
    }
    in_compose = set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE.read_text()))
    secrets = dict(
        re.findall(r"^([A-Z_]+)=(.*)$", (INFRA / "mlflow" / "secrets.env.example").read_text(), re.MULTILINE)
    )
    assert used | (in_compose - set(secrets)) == set(site) == set(VALUES)
    assert not any((*site.values(), *secrets.values()))
    assert set(secrets) <= in_compose


@pytest.mark.parametrize("path", [*KUBERNETES_FILES, *CLUSTERS], ids=lambda path: path.name)
def test_fill_puts_the_values_in(path: Path, tmp_path: Path) -> None:
    result = run(str(INFRA / "fill.sh"), str(path), env={"SITE_ENV": str(write_site(tmp_path))})
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == filled(path).rstrip("\n")


def test_fill_makes_one_stream_of_several_files(tmp_path: Path) -> None:
    files = [str(path) for path in KUBERNETES_FILES[:2]]
    result = run(str(INFRA / "fill.sh"), *files, env={"SITE_ENV": str(write_site(tmp_path))})
    documents_ = [document for document in yaml.safe_load_all(result.stdout) if document]
    assert documents_ == [document for path in KUBERNETES_FILES[:2] for document in documents(path)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SUBCAT_OUTPUT": ""}, "needs SUBCAT_OUTPUT, and"),
        ({"SUBCAT_CPU_IMAGE": "registry.example/subcat-cpu:latest"}, "is not pinned"),
        ({"SUBCAT_CPU_IMAGE": f"registry.example/subcat-cpu@{DIGEST[:-1]}"}, "is not pinned"),
    ],
)
def test_fill_refuses_what_is_missing_or_unpinned(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    path = INFRA / "kuberay" / "ray-job.masks-on-spot.yaml"
    result = run(str(INFRA / "fill.sh"), str(path), env={"SITE_ENV": str(write_site(tmp_path, **changed))})
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_build_prints_every_image_that_files_want() -> None:
    text = (INFRA / "images" / "build.sh").read_text()
    assert all(name in text for name in IMAGES)
    assert all(relative(path) in text for path in DOCKERFILES)


def test_runtime_env_is_rays(tmp_path: Path) -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**yaml.safe_load((INFRA / "runtime-env.yaml").read_text()))
    with pytest.raises(TypeError, match="exclude"):
        RuntimeEnv(excludes="/data")


@pytest.mark.parametrize("path", [INFRA / "README.md", ROOT / "docs" / "operations.md"], ids=lambda path: path.name)
def test_pages_name_files_that_exist(path: Path) -> None:
    made_by_hand = {
        "infra/site.env",
        "infra/mlflow/secrets.env",
        "infra/aws.filled.yaml",
        "infra/gcp.filled.yaml",
        "infra/mlflow/s3",
    }
    named = set(re.findall(r"(?<![\w/])infra/[\w./-]+\w", path.read_text())) - made_by_hand
    assert not [name for name in named if not (ROOT / name).exists()]
