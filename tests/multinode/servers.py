"""The servers of a cluster, which can be stopped and started again: S3 (rclone), MLflow on PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import S3_BUCKET, S3_KEY_ID, S3_SECRET, free_port

BIN = Path(sys.executable).parent
_LONGEST_START_S = 300.0


class Server:
    """A program that listens at an address; stop() and start() keep its port and its data."""

    def __init__(
        self, command: list[str], host: str, port: int, log: Path, environment: dict[str, str], user: str | None = None
    ) -> None:
        self.command, self.host, self.port = command, host, port
        self._log, self._environment, self._user = log, environment, user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                self.command, stdout=stream, stderr=stream, env=self._environment, user=self._user
            )
        deadline_s = time.monotonic() + _LONGEST_START_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                if probe.connect_ex((self.host, self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{self.command[0]} did not start: {self._log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """The program and what it started."""
        if self._process is None:
            return
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            for process in [*children, psutil.Process(self._process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()


def s3_server(host: str, folder: Path, log: Path) -> Server:
    """An S3 server whose buckets are the folders below `folder`; S3_BUCKET is made."""
    (folder / S3_BUCKET).mkdir(parents=True)
    port = free_port()
    command = [str(BIN / "rclone"), "serve", "s3", str(folder), "--addr", f"{host}:{port}"]
    command += ["--auth-key", f"{S3_KEY_ID},{S3_SECRET}", "--vfs-cache-mode", "off", "--dir-cache-time", "0s"]
    return Server(command, host, port, log, os.environ | {"RCLONE_CONFIG": str(folder.parent / "rclone.conf")})


def s3_environment(server: Server) -> dict[str, str]:
    """What clients of that server have in their environment."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": S3_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres: Debian's, or that of the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return Path(found).parent if found else None


def postgres_server(folder: Path, log: Path) -> Server:
    """A database server of its own on loopback; it refuses to run as root, so it runs as another user."""
    programs = postgres_programs()
    assert programs is not None
    user = None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    folder.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(folder, user)
    make = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "mlflow", "-A", "trust", "-E", "UTF8", "-N"]
    subprocess.run([*make, "--locale=C"], check=True, capture_output=True, user=user, cwd=folder)
    port = free_port()
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port)]
    return Server([*command, "-k", str(folder), "-c", "fsync=off"], "127.0.0.1", port, log, dict(os.environ), user)


def mlflow_server(host: str, database: Server, artifacts: str, log: Path, environment: dict[str, str]) -> Server:
    """MLflow on that database, artifacts by its own proxy in a bucket."""
    port = free_port()
    store = f"postgresql+psycopg://mlflow@127.0.0.1:{database.port}/postgres"
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", artifacts, "--allowed-hosts", "*"]
    return Server(command, host, port, log, os.environ | environment)
