"""Images are cut into tiles whose pixels and tags are right, and what does not fit is told at once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from cluster.artifacts import ArtifactMismatch
from cluster.storage import Storage, read_uri
from jobs import cut_tiles
from jobs.cut_tiles import TileSettings, has_tiles, open_tiles
from jobs.importers.tile_tags import read_tile_tags
from jobs.manifest import Manifest
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import decode_image
from subcat_core.tiles import tile_grid
from tests.jobs.tile_runs import SIZES, TILES, context_of, draw_glands, glas_values, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_glands(tmp_path_factory.mktemp("glas") / "data")


def _cut(data: Path, output: Path, tiles: dict[str, Any] | None = None, **changes: Any) -> tuple[Manifest, Manifest]:
    """(images, tiles)"""
    context = context_of(glas_values(data, str(output), tiles, **changes))
    manifest = prepared(context)
    return manifest, cut_tiles.run(context, manifest)


def test_tiles_hold_the_pixels_of_their_place_and_the_tags_of_their_mask(data: Path, tmp_path: Path) -> None:
    images, tiles = _cut(data, tmp_path / "out")
    rows = tiles.rows(None).to_pylist()
    assert tiles.rows(None).schema == schemas.MANIFEST
    for image_id, (height, width) in SIZES.items():
        pixels = np.array(Image.open(data / f"images/{image_id}.webp"))
        mask = np.array(Image.open(data / f"masks/{image_id}.png"))
        mine = [row for row in rows if row["parent_id"] == image_id]
        assert [(row["y_px"], row["x_px"]) for row in mine] == tile_grid(height, width, 24, 12)
        for row in mine:
            part = np.s_[row["y_px"] : row["y_px"] + 24, row["x_px"] : row["x_px"] + 24]
            assert np.array_equal(decode_image(read_uri(row["uri"])), pixels[part])
            assert (row["height_px"], row["width_px"]) == pixels[part].shape[:2]
            assert row["split"] == ("train" if image_id.startswith("train") else "val")
            share = (mask[part] > 0).mean()
            assert row["labels"] == [index for index, of in enumerate((1 - share, share)) if of > 0.05]
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert {tuple(row["labels"]) for row in rows} == {(0,), (0, 1)}
    assert not tiles.classes.has_background
    assert images.num_rows() == 5
    stats = Storage(str(tmp_path / "out/tiles")).read_json("marker.json")["stats"]
    assert stats["splits"]["train"]["tiles"] == tiles.num_rows("train")
    assert stats["splits"]["train"]["classes"]["not gland"] == tiles.num_rows("train")


def test_the_tiles_of_an_image_lie_in_one_shard_of_its_name(data: Path, tmp_path: Path) -> None:
    images, tiles = _cut(data, tmp_path / "out")
    assert [(shard.name, shard.split) for shard in tiles.shards] == [(s.name, s.split) for s in images.shards]
    for name in images.shard_names():
        whole = images.folder.read_table(f"{name}.parquet", ["image_id"])["image_id"].to_pylist()
        parts = tiles.folder.read_table(f"{name}.parquet", ["parent_id"])["parent_id"].to_pylist()
        assert list(dict.fromkeys(parts)) == whole


def test_finished_is_skipped_and_other_tiles_are_refused(data: Path, tmp_path: Path) -> None:
    values = glas_values(data, str(tmp_path / "out"))
    context = context_of(values)
    assert not has_tiles(context.storage)
    manifest = prepared(context)
    first = cut_tiles.run(context, manifest)
    assert has_tiles(context.storage)
    picture = Path(first.rows(None, ["uri"])["uri"][0].as_py())
    written = picture.stat().st_mtime_ns
    assert cut_tiles.run(context, manifest) == first == open_tiles(context.storage)
    assert picture.stat().st_mtime_ns == written
    other = context_of(glas_values(data, str(tmp_path / "out"), {**TILES, "segmenter_sees": "tiles"}))
    assert cut_tiles.run(other, prepared(other)) == first  # says nothing of the tiles
    other = context_of(glas_values(data, str(tmp_path / "out"), {**TILES, "stride_px": 10}))
    with pytest.raises(ArtifactMismatch, match=r"stride_px: 12 -> 10"):
        cut_tiles.run(other, prepared(other))


def test_tiles_inherit_the_tags_of_their_image(data: Path, tmp_path: Path) -> None:
    _, tiles = _cut(data, tmp_path / "out", {"tile_px": 24, "stride_px": 24})
    assert {tuple(labels) for labels in tiles.rows(None)["labels"].to_pylist()} == {(0, 1)}


def test_tags_by_tile_are_taken_where_given(data: Path, tmp_path: Path) -> None:
    table = tmp_path / "tags.csv"
    table.write_text("parent_id,x_px,y_px,labels\ntrain_1,12,0,gland\ntestB_2,0,0,\ntrain_1,0,12,gland;not gland\n")
    _, tiles = _cut(data, tmp_path / "out", {"tile_px": 24, "stride_px": 12, "tags_path": str(table)})
    labels = {row["image_id"]: row["labels"] for row in tiles.rows(None).to_pylist()}
    assert labels.pop("train_1.y0.x12") == [1]
    assert labels.pop("testB_2.y0.x0") == []
    assert set(map(tuple, labels.values())) == {(0, 1)}
    assert not tiles.folder.exists("given")


def test_all_problems_of_the_tags_at_once(data: Path, tmp_path: Path) -> None:
    table = tmp_path / "tags.csv"
    head = "parent_id,x_px,y_px,labels\n"
    table.write_text(head + "train_1,1.5,0,gland\ntrain_1,0,0,stroma\ntrain_1,12,0,gland\ntrain_1,12,0,gland\n")
    with pytest.raises(ValueError, match=r"(?s)3 errors.*given twice.*'stroma' is not in the class table") as error:
        read_tile_tags(str(table), ClassTable(("not gland", "gland")))
    assert "tags.csv:2: x_px = '1.5', y_px = '0': not whole numbers" in str(error.value)
    table.write_text(head + "train_1,13,0,gland\ntrain_9,0,0,gland\n")
    tiles = {"tile_px": 24, "stride_px": 12, "tags_path": str(table)}
    with pytest.raises(ValueError, match=r"(?s)2 errors.*no tile of train_1 begins at x_px = 13, y_px = 0.*'train_9'"):
        _cut(data, tmp_path / "out", tiles)
    table.write_text(head + "train_1,12,0,gland\n")
    assert _cut(data, tmp_path / "out", tiles)[1].num_rows()  # mended, it goes on in the same folder
    table.write_text("image,labels\n")
    with pytest.raises(ValueError, match="no column parent_id, x_px, y_px"):
        read_tile_tags(str(table), ClassTable(("gland",)))


def test_an_image_that_cannot_be_cut_is_bad_as_a_whole(data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    context = context_of(glas_values(mine, str(tmp_path / "out"), stream={"num_actors": 0, "max_bad_frac": 0.4}))
    manifest = prepared(context)
    (mine / "images/train_2.webp").write_bytes(b"broken since")
    tiles = cut_tiles.run(context, manifest)
    stats = Storage(str(tmp_path / "out/tiles")).read_json("marker.json")["stats"]
    assert [bad["image_id"] for bad in stats["bad"]] == ["train_2"]
    assert "train_2" not in set(tiles.rows(None, ["parent_id"])["parent_id"].to_pylist())


def test_large_images_are_cut_and_refused_where_they_could_not_be_used(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("subcat_core.images.MAX_PIXELS", "cluster.image_reading.MAX_PIXELS", "jobs.cut_tiles.MAX_PIXELS"):
        monkeypatch.setattr(name, 1000)
    with pytest.raises(ValueError, match=r"train_1 has 40 x 56 px.*segmenter_sees = .tiles."):
        _cut(data, tmp_path / "a", predict={"window_px": 24})
    on_tiles = {**TILES, "segmenter_sees": "tiles"}
    with pytest.raises(ValueError, match=r"testB_1 has 40 x 56 px.*set predict\.window_px"):
        _cut(data, tmp_path / "b", on_tiles)
    _, tiles = _cut(data, tmp_path / "c", on_tiles, predict={"window_px": 24})
    assert len(set(tiles.rows(None, ["parent_id"])["parent_id"].to_pylist())) == len(SIZES)
    with pytest.raises(ValueError, match="expected 1 to 2000 pixels"):
        _cut(data, tmp_path / "d", {**on_tiles, "max_image_px": 2000}, predict={"window_px": 24})


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="stride_px = 25 is longer than tile_px = 24"):
        TileSettings(tile_px=24, stride_px=25)
    with pytest.raises(ValidationError, match="tags come from one of them"):
        TileSettings(tile_px=24, stride_px=12, tags_path="tags.csv", tags_from_masks_frac=0.05)


def test_the_protocol_says_where_tags_come_from() -> None:
    by_masks = TileSettings(tile_px=112, stride_px=56, tags_from_masks_frac=0.05).protocol()
    assert "112 px at stride 56 px" in by_masks["tiles"]
    assert "annotated masks: every class that covers more than 0.05" in by_masks["tile_tags"]
    assert "not comparable with image tags" in by_masks["tile_tags"]
    assert TileSettings(tile_px=8, stride_px=8).protocol()["tile_tags"] == "those of the whole image"
    assert "given by tile" in TileSettings(tile_px=8, stride_px=8, tags_path="t.csv").protocol()["tile_tags"]
