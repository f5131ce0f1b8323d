"""The whole run on tiles: from the command line to the report, with the segmenter on images and on tiles."""

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from jobs import pipeline
from jobs.config import ConfigError, load_experiment
from jobs.results import results_tables
from tests.jobs.conftest import call_cli, write_toml
from tests.jobs.tile_runs import TILES, context_of, draw_glands, glas_values


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_glands(tmp_path_factory.mktemp("glas") / "data")


def _config(data: Path, folder: Path, tiles: dict[str, Any] | None = None) -> str:
    values = glas_values(data, str(folder / "out"), tiles)
    del values["pseudo_masks"]  # TOML has no null
    if tiles is None:
        del values["prepare"]["tiles"]
        values["prepare"]["rows_per_shard"] = 3
    return write_toml(folder / "glands.toml", values)


def test_prepare_cuts_tiles_where_the_command_line_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(data, tmp_path)
    assert call_cli(monkeypatch, "prepare", config, "--tile-px", "24", "--stride-px", "12") == 0
    storage = Storage(str(tmp_path / "out"))
    assert storage.read_json("tiles/marker.json")["stats"]["splits"]["train"]["tiles"] > 20
    assert not storage.exists("rounds")
    tiles = load_experiment(config, ["prepare.tiles.tile_px=24", "prepare.tiles.stride_px=12"]).prepare.tiles
    assert tiles is not None
    assert (tiles.tile_px, tiles.stride_px) == (24, 12)


def test_a_stride_alone_is_one_message(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_cli(monkeypatch, "prepare", _config(data, tmp_path), "--stride-px", "12") == 2
    assert "prepare.tiles.tile_px: required, but not given" in capsys.readouterr().err
    assert call_cli(monkeypatch, "run", _config(data, tmp_path), "--stage", "cut_tiles") == 2
    assert "this run has no such stage" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"prepare\.tiles.*stride_px = 25 is longer than tile_px = 24"):
        load_experiment(_config(data, tmp_path, {"tile_px": 24, "stride_px": 25}))


@pytest.mark.parametrize("sees", ["images", "tiles"])
def test_the_whole_run(data: Path, tmp_path: Path, sees: str) -> None:
    values = glas_values(data, str(tmp_path / "out"), {**TILES, "segmenter_sees": sees})
    context = context_of(values)
    pipeline.run(context)
    storage = context.storage
    for step in pipeline.plan(context.experiment):
        assert step.stage == "report" or storage.exists(f"{step.folder}/marker.json"), step
    num_tiles = storage.read_json("tiles/marker.json")["stats"]["splits"]["train"]["tiles"]
    assert storage.read_json("rounds/00/features/marker.json")["stats"]["num_images"] == num_tiles
    assert storage.list_names("pseudo_masks/png") == ["train_1.png", "train_2.png", "train_3.png"]
    assert len(storage.list_names("pseudo_masks/tiles")) == (num_tiles if sees == "tiles" else 0)
    assert storage.list_names("predictions/png") == ["testB_1.png", "testB_2.png"]
    for folder in ("rounds/00/cams", "rounds/01/cams", "pseudo_masks", "evaluation"):
        scores = storage.read_json(f"{folder}/scores.json")
        assert "not comparable with image tags" in scores["protocol"]["tile_tags"]
        assert all(0 < score["miou"] < 1 for score in scores["splits"].values())
    page = storage.read_bytes("report/index.html").decode()
    assert "Round 0: images nearest to each centroid" in page
    assert "| all gland | val | mIoU |" in results_tables([storage.root])
