"""`subcat submit` against a real cluster with a job server and tokens: ends, failures, a killed driver, the upload."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime import ROOT
from cluster.tracking import TrackingSettings
from jobs import submit
from tests.conftest import free_port
from tests.jobs.conftest import call_cli

_MAX_UPLOAD_BYTES = 5_000_000


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a cluster of its own, with token authentication; ends with its processes."""
    dashboard, gcs = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        patch.delenv("RAY_ADDRESS", raising=False)
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
        command += ["--object-store-memory=80000000", "--include-dashboard=true", "--disable-usage-stats"]
        log = (tmp_path_factory.mktemp("ray") / "head.log").open("wb")
        with log, subprocess.Popen(command, stdout=log, stderr=log) as head:
            try:
                address = f"http://127.0.0.1:{dashboard}"
                _wait_for(address, head)
                yield address
            finally:
                head.terminate()


def _wait_for(address: str, head: subprocess.Popen, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and head.poll() is None:
        try:
            submit.connect(address)
            return
        except RuntimeError:
            time.sleep(0.5)
    raise RuntimeError(f"no job server at {address} (exit code {head.poll()})")


def _python(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


def test_jobs_end_with_their_own_code_and_a_killed_driver_is_started_again(
    job_server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = submit.connect(job_server)
    assert submit.follow_to_end(client, _python('print("hello from the job")'), {}, 3) == 0
    assert "hello from the job" in capfd.readouterr().out
    assert submit.follow_to_end(client, _python("raise SystemExit(2)"), {}, 3) == 2
    assert "submission 2" not in capfd.readouterr().out  # a job that failed by itself is not tried again

    mark = tmp_path / "mark"
    dies_once = (
        f'import os, pathlib; p = pathlib.Path("{mark}"); d = p.exists(); p.touch(); d or os.kill(os.getpid(), 9)'
    )
    assert submit.follow_to_end(client, _python(dies_once), {}, 1) == 0
    told = capfd.readouterr()
    assert "submission 2 of at most 2" in told.out
    assert "driver was lost" in told.err
    assert submit.follow_to_end(client, _python("import os; os.kill(os.getpid(), 9)"), {}, 0) == 1
    assert "given up after 1 submissions" in capfd.readouterr().err


def test_a_wrong_token_is_one_clear_line(job_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from jobs import submit; submit.connect({job_server!r})"
    environment = {**os.environ, "RAY_AUTH_TOKEN": "b" * 64}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "no job server to use at" in done.stderr.splitlines()[-1]
    assert "RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1]


def test_bad_addresses_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    config = str(ROOT / "configs/demo.toml")
    assert call_cli(monkeypatch, "submit", config) == 2
    assert "give --address http://host:8265" in capsys.readouterr().err
    assert call_cli(monkeypatch, "submit", config, "--address", "ray://head:10001") == 2
    assert "jobs go to the dashboard" in capsys.readouterr().err
    assert call_cli(monkeypatch, "submit", config, "--address", f"http://127.0.0.1:{free_port()}") == 1
    assert "no job server to use at" in capsys.readouterr().err


def test_a_config_outside_the_clone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outside = tmp_path / "demo.toml"
    outside.write_text((ROOT / "configs/demo.toml").read_text())
    assert call_cli(monkeypatch, "submit", str(outside), "--address", "http://127.0.0.1:1") == 2
    assert "lies outside the clone" in capsys.readouterr().err


def test_the_upload_of_this_clone_is_small_and_is_code_alone(tmp_path: Path) -> None:
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    environment = submit.upload_environment()
    package = tmp_path / "clone.zip"
    create_package(environment["working_dir"], package, include_gitignore=True, excludes=environment["excludes"])
    assert package.stat().st_size < _MAX_UPLOAD_BYTES
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert "jobs/cli.py" in names
    assert not [name for name in names if name.split("/")[0] in (".git", "data", "outputs", ".venv")]


def test_the_place_of_mlflow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert submit.tracking_place(TrackingSettings(uri="http://mlflow:5000"), "s3://b/run") == "http://mlflow:5000"
    assert submit.tracking_place(TrackingSettings(enabled=False), "out").startswith("off")
    assert "beside s3://b/run" in submit.tracking_place(TrackingSettings(), "s3://b/run")
