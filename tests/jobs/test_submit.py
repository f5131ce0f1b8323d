"""`subcat submit` against a real cluster with a job server and tokens: ends, failures, a killed driver, the upload."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails

from cluster.runtime import ROOT
from cluster.storage import Storage
from jobs import submit
from tests.conftest import free_port
from tests.jobs.conftest import call_cli

_MAX_UPLOAD_BYTES = 5_000_000
_LONGEST_S = 300.0
_MOST_STARTS = 3
_FOLLOW = """
import sys
from jobs import submit
client = submit.connect(sys.argv[1])
for entrypoint in sys.argv[3:]:
    print("ended with", submit.follow_to_end(client, entrypoint, {}, int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The dashboard's address of a cluster of its own, and what a client of it has in its environment.

    Ray reads the token once a process, so clients of this cluster are processes of their own.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the job's own `python`
    folder = tmp_path_factory.mktemp("ray")
    with tempfile.TemporaryDirectory(prefix="ray") as short, contextlib.ExitStack() as ends:  # sockets have short names
        for attempt in range(_MOST_STARTS):  # Ray gives its raylet half a minute, too little on a machine in full use
            dashboard = free_port()
            log = folder / f"head-{attempt}.log"
            if _is_up(dashboard, ends.enter_context(_started_head(dashboard, short, environment, log)), log):
                break
        else:
            raise RuntimeError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{dashboard}", environment


@contextlib.contextmanager
def _started_head(
    dashboard: int, folder: str, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
    command += [f"--dashboard-port={dashboard}", "--object-store-memory=80000000", f"--temp-dir={folder}"]
    with log.open("wb") as stream:
        head = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        yield head
    finally:
        head.terminate()  # with --block it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(5)
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == head.pid:
                    process.kill()


def _is_up(port: int, head: subprocess.Popen[bytes], log: Path) -> bool:
    """Until raylet and dashboard are there; False where Ray gave up."""
    deadline_s = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline_s and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0 and "Ray runtime started" in log.read_text():
                return True
        time.sleep(0.2)
    return False


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_LONGEST_S
    )


def test_jobs_end_with_their_own_code_and_a_killed_driver_is_started_again(
    job_server: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = job_server
    mark = tmp_path / "mark"
    say = "import os, pathlib; print('hello from the job'); "
    kill = f"p = pathlib.Path('{mark}'); there = p.exists(); p.touch(); there or os.kill(os.getpid(), 9)"
    jobs = [f'{sys.executable} -c "{code}"' for code in (say + kill, "raise SystemExit(2)")]
    done = _run(environment, "-c", _FOLLOW, address, "1", *jobs)
    lines = done.stdout.splitlines()
    assert lines.count("hello from the job") == 2, done.stderr
    assert [line for line in lines if line.startswith("ended")] == ["ended with 0", "ended with 2"]
    assert "submission 2 of at most 2" in done.stdout
    assert done.stderr.count("its driver was lost") == 1  # what failed by itself is not tried again
    done = _run(environment, "-c", _FOLLOW, address, "0", f'{sys.executable} -c "import os; os.kill(os.getpid(), 9)"')
    assert done.stdout.endswith("ended with 1\n"), done.stderr
    assert "given up after 1 submissions" in done.stderr


def test_a_stage_is_run_by_a_job_of_the_uploaded_clone(
    job_server: tuple[str, dict[str, str]], tiny_table: Path, tmp_path: Path
) -> None:
    address, environment = job_server
    output = tmp_path / "out"
    command = ["-m", "jobs", "submit", "configs/demo.toml", "--address", address, "--stage", "prepare"]
    command += ["--set", f'output="{output}"', "--set", "stream.num_actors=1"]
    done = _run(environment, *command, "--set", f'prepare.source.path="{tiny_table}"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m jobs run configs/demo.toml" in done.stdout
    assert "MLflow: sqlite" in done.stdout
    assert Storage(str(output)).exists("manifest/marker.json")

    done = _run(environment, *command, "--set", 'prepare.source.path="nowhere.csv"')
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere.csv" in done.stdout
    assert len(done.stderr.splitlines()) == 1  # of Ray's chatter nothing, and no log twice


def test_a_wrong_token_is_one_clear_line(job_server: tuple[str, dict[str, str]]) -> None:
    address, environment = job_server
    environment = environment | {"RAY_AUTH_TOKEN": "b" * 64}
    done = _run(environment, "-m", "jobs", "submit", "configs/demo.toml", "--address", address)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no job server to use at {address} (Authentication failed")
    assert "RAY_AUTH_TOKEN" in line


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
    environment = submit.upload_environment()
    package = tmp_path / "clone.zip"
    create_package(environment["working_dir"], package, include_gitignore=True, excludes=environment["excludes"])
    assert package.stat().st_size < _MAX_UPLOAD_BYTES
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert "jobs/cli.py" in names
    assert not [name for name in names if name.split("/")[0] in (".git", "data", "outputs", ".venv")]


@pytest.mark.parametrize(
    ("status", "code", "error_type", "lost"),
    [
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", True),
        ("FAILED", 137, "JOB_ENTRYPOINT_COMMAND_ERROR", True),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", False),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", True),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", False),
        ("STOPPED", -15, None, False),
    ],
)
def test_a_lost_driver_is_told_from_one_that_failed(
    status: str, code: int | None, error_type: str | None, lost: bool
) -> None:
    details = JobDetails(type="SUBMISSION", entrypoint="", status=status, driver_exit_code=code, error_type=error_type)
    assert submit.is_lost(details) is lost
