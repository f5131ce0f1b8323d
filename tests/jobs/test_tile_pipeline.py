"""The whole run on tiles: from the command line to the report, with the segmenter on images and on tiles."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from jobs import cut_tiles, pipeline, supervised_tiles
from jobs.config import ConfigError, load_experiment, parse_experiment
from jobs.cut_tiles import open_tiles
from jobs.results import results_tables
from tests.jobs.conftest import call_cli, write_toml
from tests.jobs.tile_runs import TILES, context_of, draw_glands, glas_values, prepared


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
    assert "this config has no such stage" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"prepare\.tiles.*stride_px = 25 is longer than tile_px = 24"):
        load_experiment(_config(data, tmp_path, {"tile_px": 24, "stride_px": 25}))


@pytest.mark.parametrize("sees", ["images", "tiles"])
def test_the_whole_run(data: Path, tmp_path: Path, sees: str) -> None:
    values = glas_values(data, str(tmp_path / "out"), {**TILES, "segmenter_sees": sees}, supervised={})
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
    choice = storage.read_json("choice/choice.json")
    assert "background" not in choice
    assert choice["threshold"] == -1
    trained = [storage.read_json(f"{folder}segmenter/result.json")["num_images"] for folder in ("", "supervised/")]
    assert trained == [num_tiles // 4 * 4 if sees == "tiles" else 4] * 2  # whole batches
    described = storage.read_json("supervised/segmenter/segmenter.json")
    assert described["has_background"] is False
    if sees == "tiles":
        _check_full_masks(data, storage)
    page = storage.read_bytes("report/index.html").decode()
    assert "Round 0: images nearest to each centroid" in page
    assert "| all gland | val | mIoU |" in results_tables([storage.root])
    assert "| tags / full masks | val | ratio |" in results_tables([storage.root])


def _check_full_masks(data: Path, storage: Storage) -> None:
    """The yardstick's masks are those of the data set, cut as its tiles are."""
    tiles = open_tiles(storage).rows("train").to_pylist()
    assert storage.list_names("supervised/masks/png") == sorted(f"{tile['image_id']}.png" for tile in tiles)
    for tile in tiles:
        whole = np.array(Image.open(data / f"masks/{tile['parent_id']}.png"))
        y, x = tile["y_px"], tile["x_px"]
        part = np.where(whole[y : y + tile["height_px"], x : x + tile["width_px"]] > 0, 2, 1)
        cut = Image.open(io.BytesIO(storage.read_bytes(f"supervised/masks/png/{tile['image_id']}.png")))
        np.testing.assert_array_equal(np.array(cut), part)


def test_a_full_mask_that_does_not_fit_is_bad(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    for image_id in ("train_1", "train_2", "train_3"):
        side = 8 if image_id == "train_2" else None
        mask = Image.open(data / f"masks/{image_id}.png")
        (mask.resize((side, side)) if side else mask).save(folder / f"{image_id}.png")
    values = glas_values(data, str(tmp_path / "out"), {**TILES, "segmenter_sees": "tiles"})
    values["supervised"] = {"masks_folder": str(folder)}
    context = context_of({**values, "stream": {"num_actors": 0, "max_bad_frac": 1.0}})
    images = prepared(context)
    tiles = cut_tiles.run(context, images)
    stats = supervised_tiles.run(context, images, tiles).stats()
    assert [bad["reason"] for bad in stats["bad"]] == ["mask of (8, 8) px, its image has 40 x 40"]
    rows = tiles.rows("train").to_pylist()
    assert stats["num_images"] == sum(row["parent_id"] != "train_2" for row in rows)


def test_affinity_is_refused_with_tiles_and_without_a_background(data: Path, tmp_path: Path) -> None:
    values = glas_values(data, str(tmp_path / "out"), affinity={})
    with pytest.raises(ConfigError, match=r"\[affinity\] with prepare.tiles: .* leave one of the two out"):
        parse_experiment(values)
    del values["prepare"]["tiles"]
    with pytest.raises(ConfigError, match=r"without background: .* leave \[affinity\] out"):
        parse_experiment(values)
