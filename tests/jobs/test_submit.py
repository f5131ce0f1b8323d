"""`subcat submit`: its messages for wrong addresses and configs, and the upload."""

from pathlib import Path

import pytest

from cluster.runtime import ROOT
from cluster.tracking import TrackingSettings
from jobs import submit
from tests.conftest import free_port
from tests.jobs.conftest import call_cli

_MAX_UPLOAD_BYTES = 5_000_000


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
