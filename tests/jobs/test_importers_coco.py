"""COCO: tags, masks drawn by hand-computed rules, and every fault of the JSON told with its annotation."""

import io
import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import StreamSettings
from cluster.tracking import Tracker, TrackingSettings
from jobs import prepare
from jobs.config import ConfigError, parse_experiment
from jobs.importers import CocoSource, Source, open_source, problems
from jobs.importers.coco_masks import Drawing, Instance, decode_counts, decode_rle, draw_polygons
from jobs.importers.problems import ProblemLog
from jobs.importers.rows import BadSource, ImportRow, ImportSource, RowCounts, checked_rows
from jobs.manifest import open_manifest
from jobs.prepare import PrepareSettings
from jobs.validate import validate
from subcat_core.classes import IGNORE

SOURCE: TypeAdapter = TypeAdapter(Source)
CATEGORIES = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]


def _square(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def _annotation(annotation_id: int, image_id: int, category_id: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "area": 1.0,
        "iscrowd": 0,
        "bbox": [0, 0, 1, 1],
        **more,
    }


class Coco:
    """A folder in COCO's layout: train2014 with images 1 and 2 (4 x 6 px), val2014 with 7 and 9."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lists: dict[str, dict[str, Any]] = {}
        for split, ids in (("train2014", (1, 2)), ("val2014", (7, 9))):
            (folder / split).mkdir(parents=True)
            names = [f"COCO_{split}_{image_id:012d}.png" for image_id in ids]
            for name in names:
                Image.new("RGB", (6, 4), (90, 90, 90)).save(folder / split / name)
            images = [
                {"id": image_id, "file_name": name, "height": 4, "width": 6, "license": 3, "coco_url": "none"}
                for image_id, name in zip(ids, names, strict=True)
            ]
            self.lists[split] = {"info": {}, "images": images, "annotations": [], "categories": CATEGORIES}
        self.train["annotations"] = [_annotation(1, 1, 44, "never read"), _annotation(2, 1, 1, None)]
        self.val["annotations"] = [_annotation(5, 7, 3, [_square(1, 1, 4, 3)], area=6.0)]

    @property
    def train(self) -> dict[str, Any]:
        return self.lists["train2014"]

    @property
    def val(self) -> dict[str, Any]:
        return self.lists["val2014"]

    def open(self, **values: Any) -> ImportSource:
        return open_source(SOURCE.validate_json(json.dumps(self.settings(**values))))

    def settings(self, **values: Any) -> dict[str, Any]:
        (self.folder / "annotations").mkdir(exist_ok=True)
        for name, content in self.lists.items():
            (self.folder / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        return {"kind": "coco", "path": str(self.folder), **values}

    def rows(self, **values: Any) -> tuple[list[ImportRow], ProblemLog]:
        source, log = self.open(**values), ProblemLog()
        return list(checked_rows(source, log, RowCounts(source.classes))), log

    def problem(self, **values: Any) -> tuple[str, int | None, str]:
        """(rule, row, message) of the one problem there is, but for classes without images."""
        _, log = self.rows(**values)
        [found] = [problem for problem in log.problems() if problem.is_error]
        assert found.file.endswith(".json")
        return found.rule, found.row, found.message


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    return Coco(tmp_path / "coco")


def test_tags_and_classes_by_category_id(coco: Coco) -> None:
    rows, log = coco.rows()
    assert coco.open().classes.names == ("person", "car", "bottle")
    assert [(row.image_id, row.split, row.labels, row.row) for row in rows] == [
        ("COCO_train2014_000000000001", "train", (0, 2), None),
        ("COCO_val2014_000000000007", "val", (1,), None),
        ("COCO_val2014_000000000009", "val", (), None),
    ]
    assert rows[0].uri == str(coco.folder / "train2014/COCO_train2014_000000000001.png")
    assert [row.drawing is not None for row in rows] == [False, True, True]
    assert log.notes == {
        "images of split train without an instance of the classes (left out)": 1,
        "images of split val without an instance of the classes (kept as background)": 1,
    }
    assert not log.has_errors


def test_a_crowd_is_a_tag_and_empty_images_can_be_dropped(coco: Coco) -> None:
    rle = {"size": [4, 6], "counts": [0, 24]}
    coco.val["annotations"].append(_annotation(6, 7, 1, rle, iscrowd=1))
    rows, log = coco.rows(empty_images="drop")
    assert [row.labels for row in rows] == [(0, 2), (0, 1)]
    assert log.notes["images of split val without an instance of the classes (left out)"] == 1


def test_a_subset_of_the_classes_ignores_the_pixels_of_the_others(coco: Coco) -> None:
    coco.val["annotations"].append(_annotation(6, 9, 44, [_square(0, 0, 2, 2)]))
    rows, _ = coco.rows(classes=["bottle", "person"])
    assert [row.labels for row in rows] == [(0, 1), (), (0,)]
    masks = [Drawing.from_json(row.drawing).render() for row in rows if row.drawing]
    assert np.unique(masks[0]).tolist() == [0, IGNORE]  # the car
    assert np.unique(masks[1]).tolist() == [0, 1]


def test_polygons_cover_the_pixels_whose_centres_they_hold() -> None:
    top, left, inside = draw_polygons([_square(1, 1, 4, 3)], 4, 6)
    assert (top, left, inside.shape, inside.all()) == (1, 1, (2, 3), True)
    _, _, inside = draw_polygons([_square(0.7, 0, 2.3, 1)], 4, 6)  # centres at 0.5, 1.5, 2.5
    assert inside.tolist() == [[False, True, False]]
    _, _, inside = draw_polygons([[0, 0, 4, 4, 0, 4]], 4, 4)  # the triangle on and below the diagonal
    assert np.array_equal(np.tril(np.ones((4, 4), bool), -1), inside & ~np.eye(4, dtype=bool))


def test_polygons_of_one_object_are_united_and_cut_at_the_border() -> None:
    top, left, inside = draw_polygons([_square(-1, -1, 1, 1), _square(5, 3, 7, 9), [1, 1, 2, 2]], 4, 6)
    whole = np.zeros((4, 6), bool)
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    assert np.argwhere(whole).tolist() == [[0, 0], [3, 5]]
    assert draw_polygons([[1, 1, 2, 2]], 4, 6)[2].size == 0


def test_strips_draw_what_one_piece_would(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    polygon = (rng.random((12, 2)) * (40, 30)).ravel().tolist()
    _, _, whole = draw_polygons([polygon], 30, 40)
    monkeypatch.setattr("jobs.importers.coco_masks._STRIP_VALUES", 4000)
    assert np.array_equal(draw_polygons([polygon], 30, 40)[2], whole)


def test_polygons_agree_with_the_even_odd_rule_at_every_centre() -> None:
    """The plain version, in float64; pixels whose centre is within a fifth of a pixel of an edge may differ."""
    rng = np.random.default_rng(3)
    ys, xs = np.mgrid[:24, :32] + 0.5
    for _ in range(20):
        points = rng.random((6, 2)) * (32, 24)
        odd, near = np.zeros((24, 32), bool), np.zeros((24, 32), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (y0 > ys) != (y1 > ys)
            odd ^= crosses & (xs < x0 + (ys - y0) / (y1 - y0) * (x1 - x0))
            along = np.clip(((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
            near |= np.hypot(xs - x0 - along * (x1 - x0), ys - y0 - along * (y1 - y0)) < 0.3
        top, left, inside = draw_polygons([points.ravel().tolist()], 24, 32)
        whole = np.zeros((24, 32), bool)
        whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        assert np.array_equal(whole[~near], odd[~near])


def test_run_lengths_by_hand() -> None:
    # Down the columns: column 0 is 0 1 1, column 1 is 1 0 0.
    assert decode_rle([1, 3, 2], 3, 2).tolist() == [[False, True], [True, False], [True, False]]
    with pytest.raises(ValueError, match="add up to 5 px, the image has 3 x 2 = 6"):
        decode_rle([1, 2, 2], 3, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        decode_rle([7, -1], 3, 2)


def _encode_counts(counts: list[int]) -> str:
    """The other direction of `decode_counts`, as COCO's format describes it."""
    text = ""
    for position, count in enumerate(counts):
        value = count - counts[position - 2] if position > 2 else count
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return text


def test_the_run_length_string_by_hand() -> None:
    assert decode_counts("132") == [1, 3, 2]  # '1' is 49 - 48
    assert decode_counts("1321") == [1, 3, 2, 4]  # the fourth is 1 more than the second
    assert decode_counts("132N") == [1, 3, 2, 1]  # 'N' is 78 - 48 = 30: five bits of -2
    assert decode_counts("T3") == [100]  # 100 = 4 + 3 * 32: 4 | 32 is 'T', then '3'
    counts = [0, 7, 900, 3, 15, 16, 31, 32, 1023, 1024, 5, 100_000, 1]
    assert decode_counts(_encode_counts(counts)) == counts
    for broken in ("T", "1 2", "é"):
        with pytest.raises(ValueError, match="run-length string"):
            decode_counts(broken)


def test_smaller_objects_lie_over_larger_ones_and_crowds_where_they_are_told() -> None:
    table = Instance(3, [array("d", _square(0, 0, 6, 4))], area=24.0)
    cup = Instance(1, [array("d", _square(1, 1, 3, 3))], area=4.0)
    crowd = {"size": [4, 6], "counts": [0, 12, 12]}  # the left half
    over = Drawing(4, 6, (cup, table, Instance(2, crowd, area=12.0)))
    mask = Drawing.from_json(over.to_json()).render()
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[2, 2, 2, 3, 3, 3], [2, 1, 1, 3, 3, 3], [2, 1, 1, 3, 3, 3], [2, 2, 2, 3, 3, 3]]
    under = Drawing(4, 6, (cup, Instance(IGNORE, crowd, area=1.0, below=True))).render()
    assert under.tolist() == [[255] * 3 + [0] * 3, [255, 1, 1, 0, 0, 0], [255, 1, 1, 0, 0, 0], [255] * 3 + [0] * 3]
    counted = Drawing(4, 6, (Instance(1, cup.segmentation), Instance(2, table.segmentation))).render()
    assert (counted == 1).sum() == 4  # without an area the pixels are counted
    twins = Drawing(4, 6, (Instance(1, cup.segmentation, 4.0), Instance(2, cup.segmentation, 4.0))).render()
    assert sorted(np.unique(twins).tolist()) == [0, 1]  # the first of equals stays


def test_crowd_pixels_are_the_class_or_ignored(coco: Coco) -> None:
    coco.val["annotations"][0].update(iscrowd=1, segmentation={"size": [4, 6], "counts": "0h0"})
    for setting, value in (("class", 2), ("ignore", IGNORE)):
        rows, log = coco.rows(crowd=setting)
        assert not log.has_errors
        assert np.unique(Drawing.from_json(str(rows[1].drawing)).render()).tolist() == [value]


def test_faults_are_told_with_their_annotation(coco: Coco) -> None:
    coco.val["annotations"] = [_annotation(8, 7, 2, [_square(0, 0, 1, 1)])]
    assert coco.problem()[:2] == (problems.UNKNOWN_CATEGORY, 8)
    coco.val["annotations"] = [_annotation(8, 70, 3, [_square(0, 0, 1, 1)])]
    assert coco.problem() == (problems.UNKNOWN_IMAGE, 8, "annotation 8: image 70 is not in images")
    coco.val["annotations"] = [_annotation(8, 7, 3, [_square(0, 0, 8, 3)])]
    rule, row, message = coco.problem()
    assert (rule, row) == (problems.OUTSIDE_IMAGE, 8)
    assert "2 points lie more than 1 px outside 6 x 4 px: (8, 0), (8, 3)" in message
    assert not coco.rows(outside_px=2.0)[1].has_errors
    coco.val["annotations"] = [_annotation(8, 7, 3, {"size": [6, 4], "counts": [24]})]
    rule, row, message = coco.problem()
    assert (rule, row) == (problems.MASK_SIZE, 8)
    assert "of [6, 4] px (height, width), the image of [4, 6]" in message
    for broken in (
        {"size": [4, 6], "counts": [3]},
        {"size": [4, 6]},
        [[1, 2, 3]],
        [1, 2, 3, 4, 5, 6],
        [],
        None,
        [["a"]],
    ):
        coco.val["annotations"] = [_annotation(8, 7, 3, broken)]
        assert coco.problem()[:2] == (problems.BAD_ANNOTATION, 8), broken
    coco.val["annotations"] = [{"id": 8, "image_id": 7}]
    assert coco.problem()[0] == problems.BAD_ANNOTATION
    coco.val["annotations"] = [_annotation(8, 7, 3, [[1, 1, 2, 2], _square(1, 1, 4, 3)])]
    _, log = coco.rows()
    assert log.notes["polygons of fewer than three points (not drawn)"] == 1
    assert not log.has_errors


def test_faults_of_the_list_of_images(coco: Coco) -> None:
    coco.val["images"].append(dict(coco.val["images"][0]))
    assert coco.problem()[0] == problems.DUPLICATE_ID
    coco.val["images"][2] = {"id": 12, "file_name": "new.png"}
    assert "image 12: its height and width are None and None" in coco.problem()[2]
    coco.val["images"][2] = {"file_name": "new.png"}
    assert coco.problem()[0] == problems.BAD_JSON
    coco.val["images"][2] = {"id": 12, "file_name": 3, "height": 4, "width": 6}
    assert "image 12: its file_name is 3" in coco.problem()[2]


def test_a_file_that_is_not_coco(coco: Coco) -> None:
    for content, said in (({"images": []}, "no list annotations, categories"), ([], "no list images")):
        coco.lists["val2014"] = content  # type: ignore[assignment]
        with pytest.raises(BadSource, match=said):
            coco.open()
    coco.lists["val2014"] = {**coco.train, "categories": CATEGORIES[:2]}
    with pytest.raises(BadSource, match=r"categories differ from those of .*train2014\.json"):
        coco.open()
    coco.lists["val2014"] = {**coco.train, "categories": [*CATEGORIES, {"id": 1, "name": "cup"}]}
    with pytest.raises(BadSource, match=r"category 1 .'cup'. appears again"):
        coco.open()
    coco.lists["val2014"] = {**coco.train, "categories": [{"id": 1}]}
    with pytest.raises(BadSource, match="no whole id and name"):
        coco.open()
    with pytest.raises(BadSource, match="no such file"):
        coco.open(splits={"train": "annotations/instances_train2017.json"})
    cut = coco.folder / "annotations/instances_cut.json"
    cut.write_text('{"images": [')
    with pytest.raises(BadSource, match="cut off"):
        coco.open(splits={"train": "annotations/instances_cut.json"})


def test_settings_that_do_not_fit(coco: Coco) -> None:
    with pytest.raises(BadSource, match="classes dog are no categories; there are person, car, bottle"):
        coco.open(classes=["dog"])
    with pytest.raises(ValidationError, match=r"give images\.train, a folder"):
        coco.open(splits={"train": "labels.json"})
    with pytest.raises(ValidationError, match="name test, but the splits are train, val"):
        coco.open(mask_splits=["test"])
    settings = CocoSource(path="x", splits={"train": "a.json"}, images={"train": "pictures"})
    assert settings.images_folder("train") == "pictures"
    with pytest.raises(ConfigError, match=r"prepare\.source\.crowds: unknown key; nearest: crowd"):
        parse_experiment(
            {"name": "a", "output": "b", "prepare": {"source": {"kind": "coco", "path": "x", "crowds": 1}}}
        )


def test_fingerprints_are_those_of_the_files(coco: Coco) -> None:
    before = coco.open().fingerprints
    assert sorted(Path(uri).name for uri in before) == ["instances_train2014.json", "instances_val2014.json"]
    coco.val["annotations"].append(_annotation(6, 9, 1, [_square(0, 0, 1, 1)]))
    assert coco.open().fingerprints != before


def _prepare(coco: Coco, output: Storage, **values: Any) -> None:
    text = json.dumps({"source": coco.settings(**values), "rows_per_shard": 1, "max_bad_frac": 0.5})
    experiment = SimpleNamespace(prepare=PrepareSettings.model_validate_json(text), stream=StreamSettings(num_actors=0))
    context: Any = SimpleNamespace(
        experiment=experiment,
        storage=output,
        progress=Progress(io.StringIO()),
        tracker=Tracker(TrackingSettings(enabled=False), output, "prepare"),
    )
    prepare.run(context)


def test_prepare_draws_the_masks_and_finds_images_of_another_size(coco: Coco, tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    _prepare(coco, output)
    rows = open_manifest(output).rows("val").to_pylist()
    assert [row["mask_uri"] for row in rows] == [
        output.uri(f"manifest/masks/COCO_val2014_00000000000{number}.png") for number in (7, 9)
    ]
    assert [shard.num_masks for shard in open_manifest(output).shards] == [0, 1, 1]
    with Image.open(rows[0]["mask_uri"]) as mask:
        assert mask.mode == "P"
        assert np.asarray(mask).tolist() == [[0] * 6, [0, 2, 2, 2, 0, 0], [0, 2, 2, 2, 0, 0], [0] * 6]
    with Image.open(rows[1]["mask_uri"]) as mask:
        assert not np.asarray(mask).any()

    Image.new("RGB", (4, 6)).save(coco.folder / "val2014/COCO_val2014_000000000009.png")
    _prepare(coco, Storage(str(tmp_path / "again")))
    [bad] = Storage(str(tmp_path / "again")).read_table("manifest/quarantine.parquet").to_pylist()
    assert bad["image_id"] == "COCO_val2014_000000000009"
    assert "says 4 x 6 px, the image has 6 x 4" in bad["reason"]


def test_validate_tells_lists_and_files(coco: Coco) -> None:
    (coco.folder / "val2014/COCO_val2014_000000000007.png").unlink()
    coco.val["annotations"].append(_annotation(6, 9, 2, []))
    settings = PrepareSettings.model_validate_json(json.dumps({"source": coco.settings()}))
    for decode in (False, True):
        told = {problem.rule for problem in validate(settings, decode=decode) if problem.is_error}
        assert told == {problems.UNKNOWN_CATEGORY, problems.MISSING_FILE}
    assert not (coco.folder / "masks").exists()
