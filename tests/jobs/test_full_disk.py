"""A run whose disk fills up in the middle: one clear message, nothing half-written that counts, and it goes on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import MARKER
from cluster.storage import Storage
from subcat_core.classes import ClassTable
from subcat_core.images import decode_mask
from tests.conftest import mounted_disk
from tests.jobs.conftest import TINY_CLASSES, call_cli, scores_of, small_values, write_toml

KB, MB = 1 << 10, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB, twice what the run needs."""
    with mounted_disk(tmp_path / "disk", "64m") as folder:
        yield folder


@pytest.fixture(scope="module")
def expected(tiny_table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores of the same run on a disk with room."""
    folder = tmp_path_factory.mktemp("roomy")
    config = write_toml(folder / "tiny.toml", small_values(tiny_table, str(folder / "out")))
    with pytest.MonkeyPatch.context() as patch:
        assert call_cli(patch, "run", config) == 0
    return scores_of(str(folder / "out"))


def _fill(disk: Path, free_bytes: int) -> Path:
    """A file that leaves so many bytes free; delete it to free the rest."""
    room = os.statvfs(disk)
    padding = disk / "padding"
    padding.write_bytes(bytes(room.f_bavail * room.f_frsize - free_bytes))
    room = os.statvfs(disk)
    assert room.f_bavail * room.f_frsize <= free_bytes
    return padding


def _told_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a failed command: one line, and no trace."""
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    return line


def test_a_disk_that_fills_up_during_pseudo_masks(
    disk: Path,
    tiny_table: Path,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_toml(disk / "tiny.toml", small_values(tiny_table, str(disk / "out")))
    assert call_cli(monkeypatch, "run", config, "--stage", "make_train_cams") == 0
    padding = _fill(disk, 48 * KB)  # room for the first of three shards: four masks, their index and its summary
    assert call_cli(monkeypatch, "run", config) == 1
    error = _told_error(capsys)
    folder = disk / "out" / "pseudo_masks"
    assert f"{folder}/" in error
    assert "cannot write: the disk is full; free space" in error

    assert not (folder / MARKER).exists()
    whole = sorted(folder.glob("part-*.json"))
    assert 1 <= len(whole) < 3, "the disk must have filled up in the middle of the stage"
    lut = ClassTable(TINY_CLASSES).mask_lut()
    for summary in whole:
        table = Storage(str(folder)).read_table(f"{summary.stem}.parquet")
        assert table.num_rows == json.loads(summary.read_text())["num_rows"] == 4
        for mask in table["mask_uri"].to_pylist():
            assert decode_mask(Path(mask).read_bytes(), lut).shape == (48, 48)
    assert not list((disk / "out").rglob(".*.tmp"))

    kept = {path: path.read_bytes() for path in whole}
    padding.unlink()
    assert call_cli(monkeypatch, "run", config) == 0
    assert scores_of(str(disk / "out")) == expected
    assert {path: path.read_bytes() for path in whole} == kept  # their seconds stand in them: not done again


def test_a_disk_that_fills_up_during_training(
    disk: Path,
    tiny_table: Path,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_toml(disk / "tiny.toml", small_values(tiny_table, str(disk / "out")))
    assert call_cli(monkeypatch, "run", config, "--stage", "make_pseudo_masks") == 0
    padding = _fill(disk, 10 * MB)  # room for one checkpoint of 7 MB
    assert call_cli(monkeypatch, "run", config) == 1
    error = _told_error(capsys)
    folder = disk / "out" / "segmenter"
    assert f"{folder}/checkpoints/epoch-0002.pt: cannot write: the disk is full; free space" in error

    assert not [name for name in (MARKER, "result.json", "model.pt") if (folder / name).exists()]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    kept = torch.load(checkpoint, weights_only=True)["history"]
    assert [record["epoch"] for record in kept] == [1]

    padding.unlink()
    assert call_cli(monkeypatch, "run", config) == 0
    assert scores_of(str(disk / "out")) == expected
    assert json.loads((folder / "result.json").read_text())["history"][:1] == kept  # its seconds too: trained once
