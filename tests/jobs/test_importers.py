"""Every layout gives the same kind of rows, and every problem is told with its file and row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from cluster.storage import Storage
from jobs.importers import Source, list_images, open_source, problems
from jobs.importers.problems import Problem, ProblemLog, format_problems
from jobs.importers.rows import (
    BadSource,
    ImportRow,
    ImportSource,
    RowCounts,
    checked_rows,
    derived_id,
    is_legal_id,
    resolve_uri,
)
from jobs.manifest import open_manifest
from subcat_core.classes import IGNORE
from tests.conftest import S3_BUCKET

SOURCE: TypeAdapter = TypeAdapter(Source)


def _open(**values: Any) -> ImportSource:
    return open_source(SOURCE.validate_json(json.dumps(values)))


def _import(source: ImportSource) -> tuple[list[ImportRow], ProblemLog]:
    log = ProblemLog()
    return list(checked_rows(source, log, RowCounts(source.classes))), log


def _told(log: ProblemLog) -> list[tuple[str, int | None]]:
    return [(problem.rule, problem.row) for problem in log.problems()]


def _table(folder: Path, *lines: str, name: str = "labels.csv") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_folder_per_class_with_masks(tmp_path: Path) -> None:
    _touch(tmp_path / "data", "dog/1.jpg", "cat/1.PNG", "cat/my cat.jpg", "cat/notes.txt")
    _touch(tmp_path / "masks", "cat/1.png")
    source = _open(kind="folders", path=str(tmp_path / "data"), masks_path=str(tmp_path / "masks"))
    rows, log = _import(source)
    assert source.classes.names == ("cat", "dog")
    assert [(row.image_id.split("-")[0], row.labels, row.mask_uri is not None) for row in rows] == [
        ("cat.1", (0,), True),
        ("cat.my_cat", (0,), False),
        ("dog.1", (1,), False),
    ]
    assert log.notes == {"files that are no images by their suffix": 1}


def test_folder_per_split_and_class(tmp_path: Path) -> None:
    _touch(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg", "val/wolf/1.jpg")
    source = _open(kind="folders", path=str(tmp_path), splits=["train", "val", "test"], classes=["cat"])
    rows, log = _import(source)
    assert [(row.image_id, row.split) for row in rows] == [("train.cat.1", "train"), ("val.cat.1", "val")]
    assert [problem.rule for problem in log.problems()] == [problems.UNKNOWN_CLASS, problems.EMPTY_SPLIT]
    assert "wolf" in log.problems()[0].place


def test_folders_on_s3(s3_server: str) -> None:
    root = Storage("s3://subcat-test/folders")
    for name in ("cat/1.jpg", "dog/2.jpg"):
        root.write_bytes(name, b"x")
    rows, _ = _import(_open(kind="folders", path=root.uri()))
    assert [(row.image_id, row.uri) for row in rows] == [
        ("cat.1", "s3://subcat-test/folders/cat/1.jpg"),
        ("dog.2", "s3://subcat-test/folders/dog/2.jpg"),
    ]


def test_no_class_folders_and_another_listing(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="no class folders"):
        _open(kind="folders", path=str(tmp_path))
    _touch(tmp_path, "cat/1.jpg")
    before = _open(kind="folders", path=str(tmp_path)).fingerprints
    _touch(tmp_path, "cat/2.jpg")
    assert _open(kind="folders", path=str(tmp_path)).fingerprints != before


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    lists = {"train": "a\nb\nc\nd\n", "official": "a\n", "val": "e\n"}
    for name, text in lists.items():
        _touch(tmp_path, f"ImageSets/Segmentation/{name}.txt")
        (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text(text)
    return tmp_path


def _annotate(voc: Path) -> None:
    tags = {"a": ["cat", "cow", "cat"], "b": ["dog", "cat"], "c": ["cow"], "e": ["dog"]}
    (voc / "Annotations").mkdir()
    for image_id, names in tags.items():
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        (voc / f"Annotations/{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")


def _voc(path: Path | str, **values: Any) -> ImportSource:
    base = {"classes": ["cat", "dog"], "mask_lists": {"train": "official", "val": "val"}}
    return _open(kind="voc", path=str(path), **{**base, **values})


def _voc_rows(voc: Path | str, source: ImportSource) -> None:
    rows, log = _import(source)
    assert [(row.image_id, row.split, row.labels, row.row) for row in rows] == [
        ("a", "train", (0,), 1),
        ("b", "train", (0, 1), 2),
        ("e", "val", (1,), 1),
    ]
    assert [row.uri for row in rows] == [f"{voc}/JPEGImages/{name}.jpg" for name in ("a", "b", "e")]
    masks = [row.mask_uri for row in rows]
    assert masks == [f"{voc}/SegmentationClass/a.png", None, f"{voc}/SegmentationClass/e.png"]
    assert log.notes == {"images with none of the classes (left out)": 1}
    assert _told(log) == [(problems.NO_TAG, 4)]  # d is in no table of tags
    values = source.classes.mask_values
    assert values is not None
    assert (values[0], values[8], values[12], values[10], values[255]) == (0, 1, 2, IGNORE, IGNORE)


def test_voc_with_a_table_of_tags(voc: Path) -> None:
    _table(voc, "image_id,cat,dog,cow", "a,1,0,1", "b,1,1,0", "c,0,0,1", "e,0,1,0", "other,1,1,1")
    _voc_rows(voc, _voc(voc))


def test_voc_with_annotations(voc: Path) -> None:
    _annotate(voc)
    _voc_rows(voc, _voc(voc))


@pytest.mark.parametrize("tags", ["table", "annotations"])
def test_voc_on_s3(s3_server: str, voc: Path, tags: str) -> None:
    if tags == "table":
        _table(voc, "image_id,cat,dog,cow", "a,1,0,1", "b,1,1,0", "c,0,0,1", "e,0,1,0")
    else:
        _annotate(voc)
    root = Storage(f"s3://{S3_BUCKET}/voc-{tags}")
    for path in voc.rglob("*"):
        if path.is_file():
            root.write_bytes(str(path.relative_to(voc)), path.read_bytes())
    source = _voc(root.uri())
    assert root.uri("ImageSets/Segmentation/train.txt") in source.fingerprints
    _voc_rows(root.uri(), source)


def test_voc_names_missing_lists_unknown_classes_and_leaks(voc: Path) -> None:
    _table(voc, "image_id,cat,dog", "a,1,0", "b,1,x", "c,0,1", "d,0,1", "e,0,1")
    with pytest.raises(BadSource, match=r"trainaug.txt: no such list"):
        _voc(voc, splits={"train": "trainaug"}, mask_lists={})
    with pytest.raises(ValidationError, match="wolf are not in all_classes"):
        _voc(voc, classes=["wolf"])
    with pytest.raises(ValidationError, match="mask_lists names test"):
        _voc(voc, mask_lists={"test": "val"})
    told = _told(_import(_voc(voc, splits={"train": "train", "val": "official"}, mask_lists={}))[1])
    assert told == [(problems.BAD_TAG, 3), (problems.DUPLICATE_ID, 1)]


def test_derived_ids_are_legal_and_apart() -> None:
    assert derived_id("a/b.c.jpg") == "a.b.c"
    odd = [derived_id(name) for name in ("my cat.jpg", "my_cat!.jpg", "été.jpg", ".hidden.jpg", "x" * 300 + ".jpg")]
    assert all(is_legal_id(name) for name in odd)
    assert len(set(odd)) == len(odd)
    assert not any(is_legal_id(name) for name in ("", ".", "..", "a/b", "a b", "é", "x" * 201))


def test_resolve_uri_normalises() -> None:
    assert resolve_uri("/data/lists", "../a.png") == "/data/a.png"
    assert resolve_uri("s3://bucket/lists", "./x/a.png") == "s3://bucket/lists/x/a.png"
    with pytest.raises(ValueError, match="no known kind"):
        resolve_uri("/data", "http://host/a.png")


def test_problem_log_is_bounded_and_counts_all() -> None:
    log = ProblemLog()
    for row in range(1500):
        log.add(problems.NO_TAG, "x", "f.csv", row)
    kept = log.problems()
    assert len(kept) == 1001
    assert kept[-1] == Problem(problems.NO_TAG, "and 500 more of this kind", number=500)
    assert format_problems([]) == "no problems"
    text = format_problems(kept, max_shown=3)
    assert text.startswith(f"1500 errors, 0 warnings\n{problems.NO_TAG} (error, 1500): ")
    assert text.endswith("and 1497 more; `subcat validate` lists a thousand")
    assert "and 7 more; `subcat validate` lists all" in format_problems(kept[:10], max_shown=3)
    assert format_problems(kept).endswith("f.csv:999: x\n  and 500 more of this kind")


def test_list_images_of_a_manifest_are_its_rows(finished_run: str) -> None:
    rows = open_manifest(Storage(finished_run)).rows(None, columns=["image_id", "uri"]).to_pylist()
    assert [row["image_id"] for row in rows] == [f"{index:03d}" for index in range(16)]
    assert list_images(finished_run) == rows  # not the masks and pictures that also lie below the output
    assert list_images(f"{finished_run}/manifest") == rows


def test_list_images_of_folder_file_and_table(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "sub/b c.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    rows = list_images(str(folder))
    assert [row["uri"] for row in rows] == [f"{folder}/a.jpg", f"{folder}/a.png", f"{folder}/sub/b c.png"]
    ids = [row["image_id"] for row in rows]
    assert ids[0] == "a"
    assert len(set(ids)) == 3
    assert all(is_legal_id(image_id) for image_id in ids)
    assert list_images(str(folder / "a.png")) == [{"image_id": "a", "uri": f"{folder}/a.png"}]
    table = _table(tmp_path, "uri", "pictures/a.png")
    assert list_images(table) == [{"image_id": "a", "uri": f"{folder}/a.png"}]
    with pytest.raises(ValueError, match="no images found"):
        list_images(str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="no such file"):
        list_images(str(tmp_path / "nothing.png"))
