"""The GlaS layout: two classes and no background, sets by the names of the images, any mask value but 0 a gland."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from jobs.importers import ImportSource, Source, open_source, problems
from jobs.importers.problems import ProblemLog
from jobs.importers.rows import BadSource, ImportRow, RowCounts, checked_rows
from subcat_core.images import decode_mask

SOURCE: TypeAdapter = TypeAdapter(Source)


def _open(folder: Path, **values: Any) -> ImportSource:
    return open_source(SOURCE.validate_json(json.dumps({"kind": "glas", "path": str(folder), **values})))


def _import(source: ImportSource) -> tuple[list[ImportRow], ProblemLog]:
    log = ProblemLog()
    return list(checked_rows(source, log, RowCounts(source.classes))), log


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_rows_by_set_and_number(tmp_path: Path) -> None:
    _touch(tmp_path, "images/train_10.webp", "images/train_2.bmp", "images/testB_1.png", "images/testA_3.webp")
    _touch(tmp_path, "images/Thumbs.db", "masks/train_2.png", "Grade.csv")
    source = _open(tmp_path, splits={"train": ["train"], "val": ["testB"]})
    rows, log = _import(source)
    assert [(row.image_id, row.split, row.labels) for row in rows] == [
        ("testB_1", "val", (0, 1)),
        ("train_2", "train", (0, 1)),
        ("train_10", "train", (0, 1)),
    ]
    assert rows[1].uri == str(tmp_path / "images/train_2.bmp")
    assert rows[2].mask_uri == str(tmp_path / "masks/train_10.png")  # is missing; prepare tells so
    assert log.notes == {"images of sets that no split names (left out)": 1}
    assert not log.problems()
    rows, _ = _import(_open(tmp_path))
    assert [row.split for row in rows] == ["val", "val", "train", "train"]


def test_classes_and_mask_values(tmp_path: Path) -> None:
    _touch(tmp_path, "images/train_1.webp")
    classes = _open(tmp_path).classes
    assert classes.names == ("not gland", "gland")
    assert not classes.has_background
    Image.fromarray(np.array([[0, 255], [1, 37]], np.uint8)).save(tmp_path / "mask.png")
    mask = decode_mask((tmp_path / "mask.png").read_bytes(), classes.mask_lut())
    assert mask.tolist() == [[1, 2], [2, 2]]


def test_another_listing_is_another_input(tmp_path: Path) -> None:
    _touch(tmp_path, "images/train_1.webp")
    before = _open(tmp_path).fingerprints
    assert _open(tmp_path).fingerprints == before
    _touch(tmp_path, "masks/train_1.png")
    assert _open(tmp_path).fingerprints != before


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="no images here"):
        _open(tmp_path)
    _touch(tmp_path, "images/testB_1.webp")
    _, log = _import(_open(tmp_path))
    assert [problem.rule for problem in log.problems()] == [problems.EMPTY_SPLIT]
    with pytest.raises(ValidationError, match="testB stands in two splits"):
        _open(tmp_path, splits={"train": ["train", "testB"], "val": ["testB"]})
