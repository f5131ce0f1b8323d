"""The session's cluster as workers see it, joining a running one, what is refused, and quiet."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster import runtime
from cluster.runtime import (
    ClusterSettings,
    available_resources,
    check_shared_storage,
    peak_rss_bytes,
    start_ray,
    worker_environment,
)
from cluster.storage import Storage

ROOT = Path(__file__).parents[2]


def test_workers_import_the_clone_and_have_the_environment(ray_cluster: None) -> None:
    @ray.remote
    def look() -> tuple[str, dict[str, str]]:
        import jobs

        return jobs.__file__, dict(os.environ)

    path, environment = ray.get(look.remote())
    assert Path(path).parent == ROOT / "jobs"
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "8589934592"
    assert environment["MALLOC_TOP_PAD_"] == "268435456"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["AWS_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]


def test_the_driver_keeps_its_own_environment(ray_cluster: None) -> None:
    assert "MALLOC_TOP_PAD_" not in os.environ
    assert "RAY_DATA_LOG_LEVEL" not in os.environ


def test_a_running_ray_is_used_and_left(ray_cluster: None) -> None:
    with start_ray(ClusterSettings()):
        assert available_resources() == {"num_cpus": 8.0, "num_gpus": 0.0, "num_nodes": 1.0}
    assert ray.is_initialized()


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = (
        {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)} | environment
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=variables, timeout=120
    )


START = """
import ray
from cluster.runtime import ClusterSettings, start_ray, available_resources
@ray.remote
def where():
    import os, cluster
    return cluster.__file__, os.environ.get("RAY_AUTH_MODE"), os.environ["OMP_NUM_THREADS"]
with start_ray(ClusterSettings({settings})):
    print(*ray.get(where.remote()), available_resources()["num_cpus"])
print(ray.is_initialized())
"""


def test_a_local_cluster_from_another_folder_is_quiet_and_makes_a_private_token(tmp_path: Path) -> None:
    code = START.format(settings="num_cpus=5, num_gpus=0, object_store_bytes=100_000_000, threads_per_worker=2")
    shown = run_python(code, tmp_path, HOME=str(tmp_path), OMP_NUM_THREADS="2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == [str(ROOT / "cluster" / "__init__.py"), "token", "2", "5.0", "False"]
    assert shown.stderr == ""
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_joining_a_running_cluster_ships_the_packages(ray_cluster: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    shown = run_python(START.format(settings=f"address={address!r}"), tmp_path, RAY_AUTH_MODE="token")
    assert shown.returncode == 0, shown.stderr
    module, mode, threads, cpus, left = shown.stdout.split()
    assert module.endswith("cluster/__init__.py")
    assert (mode, threads, cpus, left) == ("token", "1", "8.0", "False")
    assert ray.cluster_resources()["CPU"] == 8  # joined, and left as it was


def test_a_token_is_kept_and_a_home_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime._ensure_token()
    first = (tmp_path / ".ray" / "auth_token").read_text()
    runtime._ensure_token()
    assert (tmp_path / ".ray" / "auth_token").read_text() == first
    assert "RAY_AUTH_TOKEN" not in os.environ
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    runtime._ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ray://host:10001.*ray#47759.*ray job submit"):
        runtime._check(ClusterSettings(address="ray://host:10001"), "ray://host:10001")
    with pytest.raises(ValueError, match="num_cpus, num_gpus is of a cluster started here, and address 'auto'"):
        runtime._check(ClusterSettings(address="auto", num_cpus=2, num_gpus=0), "auto")
    shown = run_python(
        "from cluster.runtime import *\ntry:\n    with start_ray(ClusterSettings(address='auto')): pass\n"
        "except RuntimeError as error: print(error)",
        tmp_path,
        RAY_TMPDIR=str(tmp_path),
        RAY_ADDRESS="",
    )  # fmt: skip
    if "no Ray cluster answers" not in shown.stdout:  # somebody else's cluster runs on this machine
        pytest.skip("another Ray cluster answers at 'auto' on this machine")
    assert shown.stdout.startswith("no Ray cluster answers at address 'auto' (")


def test_shared_storage_is_asked_for_with_several_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_shared_storage(Storage(str(tmp_path)))
    monkeypatch.setattr(runtime, "available_resources", lambda: {"num_cpus": 8.0, "num_gpus": 0.0, "num_nodes": 3.0})
    with pytest.raises(ValueError, match="is a local path, and the cluster has 3 nodes; give an s3:// root"):
        check_shared_storage(Storage(str(tmp_path)))
    check_shared_storage(Storage(str(tmp_path)), shared_folder=True)
    check_shared_storage(Storage("s3://bucket/run"))


def test_measures() -> None:
    assert 10_000_000 < peak_rss_bytes() < 1 << 40
    assert worker_environment(3)["NUMBA_NUM_THREADS"] == "3"
    assert worker_environment()["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
