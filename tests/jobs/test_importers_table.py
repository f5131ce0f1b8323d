"""Tables: tags in one cell or in one column a class, CSV and Parquet alike; problems told with their rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from cluster.storage import Storage
from jobs.importers import Source, open_source, problems
from jobs.importers.problems import ProblemLog, format_problems
from jobs.importers.rows import (
    BadSource,
    ImportRow,
    ImportSource,
    RowCounts,
    checked_rows,
    hashed_split,
)
from subcat_core.classes import IGNORE, ClassTable

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


def test_table_with_names_splits_and_masks(tmp_path: Path) -> None:
    path = _table(
        tmp_path,
        "image,labels,split,mask",
        "a.png,dog;cat,train,m/a.png",
        "/data/b.png,cat|cat,val,",
        "s3://bucket/c.png,dog,train,../c.png",
    )
    source = _open(kind="table", path=path)
    rows, log = _import(source)
    assert source.classes == ClassTable(("cat", "dog"))
    assert _told(log) == []
    file = str(tmp_path / "labels.csv")
    assert rows == [
        ImportRow("a", f"{tmp_path}/a.png", "train", (0, 1), f"{tmp_path}/m/a.png", file, 2),
        ImportRow("b", "/data/b.png", "val", (0,), None, file, 3),
        ImportRow("c", "s3://bucket/c.png", "train", (1,), f"{tmp_path.parent}/c.png", file, 4),
    ]


def test_table_with_a_column_a_class_in_csv_and_parquet_agree(tmp_path: Path) -> None:
    columns = {"image_id": ["x", "y"], "uri": ["x.jpg", "y.jpg"], "cat": [1, 0], "dog": [1, 1]}
    lines = [",".join(columns), *(",".join(map(str, cells)) for cells in zip(*columns.values(), strict=True))]
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    rows, _ = _import(_open(kind="table", path=_table(tmp_path, *lines)))
    parquet_rows, _ = _import(_open(kind="table", path=str(tmp_path / "labels.parquet")))
    assert [(row.image_id, row.labels, row.split) for row in rows] == [("x", (0, 1), "train"), ("y", (1,), "train")]
    assert [(row.image_id, row.uri, row.labels) for row in parquet_rows] == [
        (row.image_id, row.uri, row.labels) for row in rows
    ]
    assert [row.row for row in parquet_rows] == [1, 2]


def test_parquet_lists_of_names_and_booleans(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "labels": [["dog", "cat"]]}), tmp_path / "lists.parquet")
    assert _import(_open(kind="table", path=str(tmp_path / "lists.parquet")))[0][0].labels == (0, 1)
    pq.write_table(pa.table({"image": ["a.png"], "cat": [False], "dog": [True]}), tmp_path / "flags.parquet")
    assert _import(_open(kind="table", path=str(tmp_path / "flags.parquet")))[0][0].labels == (1,)


def test_table_on_s3_resolves_against_its_own_folder(s3_server: str) -> None:
    folder = Storage("s3://subcat-test/importers")
    folder.write_bytes("lists/labels.csv", b"image,labels\n../images/a.png,cat\n")
    rows, _ = _import(_open(kind="table", path=folder.uri("lists/labels.csv")))
    assert rows[0].uri == "s3://subcat-test/importers/images/a.png"


def test_table_tells_every_problem_with_its_row(tmp_path: Path) -> None:
    path = _table(
        tmp_path,
        "image_id,image,labels,split",
        "a,a.png,cat,train",
        "b,b.png,wolf,train",  # unknown class
        "c,c.png,,train",  # no tag
        "d,d.png,,val",  # fine: val may go without
        "a,e.png,cat,val",  # duplicate
        "f/f,f.png,cat,train",  # illegal
        "g,g.png,cat",  # too few cells
        "h,,cat,train",  # no image
        "i,http://host/i.png,cat,train",  # unknown scheme
        'j,"j,1.png",cat;dog;wolf,train',  # one of three unknown
    )
    rows, log = _import(_open(kind="table", path=path, classes=["cat", "dog", "cow"]))
    assert [(row.image_id, row.labels) for row in rows] == [("a", (0,)), ("d", ()), ("a", (0,)), ("j", (0, 1))]
    assert _told(log) == [
        (problems.UNKNOWN_CLASS, 3),
        (problems.NO_TAG, 4),
        (problems.ILLEGAL_ID, 7),
        (problems.BAD_TABLE, 8),
        (problems.BAD_TABLE, 9),
        (problems.MISSING_FILE, 10),
        (problems.UNKNOWN_CLASS, 11),
        (problems.DUPLICATE_ID, 6),
        (problems.EMPTY_CLASS, None),
    ]
    text = format_problems(log.problems())
    assert text.startswith("8 errors, 1 warning")
    assert f"{path}:3: 'wolf' of b is not in the class table (cat, dog, cow)" in text
    assert "first in row 2" in text


def test_bad_tag_value_is_told(tmp_path: Path) -> None:
    path = _table(tmp_path, "image,cat,weight", "a.png,1,0.7")
    assert _told(_import(_open(kind="table", path=path))[1])[0] == (problems.BAD_TAG, 2)
    assert _told(_import(_open(kind="table", path=path, classes=["cat"]))[1]) == []


def test_class_with_one_image_and_image_with_every_tag_are_fine(tmp_path: Path) -> None:
    rows, log = _import(_open(kind="table", path=_table(tmp_path, "image,labels", "a.png,cat;cow;dog", "b.png,cat")))
    assert [row.labels for row in rows] == [(0, 1, 2), (0,)]
    assert _told(log) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,labels", "a.png,cat"], "no column image .*the columns are: name, labels"),
        (["image,labels,labels", "a.png,cat,cat"], "columns appear twice: labels"),
        (["image,split", "a.png,train"], "no tags"),
        ([""], "no column image"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(BadSource, match=message):
        _open(kind="table", path=_table(tmp_path, *lines))


def test_missing_class_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="no column cow "):
        _open(kind="table", path=_table(tmp_path, "image,cat", "a.png,1"), classes=["cat", "cow"])


def test_truncated_and_missing_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"image": ["a.png"] * 100, "labels": ["cat"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadSource, match=r"labels.parquet: truncated, or no Parquet file"):
        _open(kind="table", path=str(path))
    with pytest.raises(BadSource, match="no such file"):
        _open(kind="table", path=str(tmp_path / "other.csv"))
    with pytest.raises(BadSource, match=r"ends in .csv"):
        _open(kind="table", path=str(tmp_path / "labels.xlsx"))


def test_csv_in_another_encoding_tells_the_row(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("image,labels\na.png,cat\né.png,cat\n".encode("latin-1"))
    rows, log = _import(_open(kind="table", path=str(tmp_path / "labels.csv")))
    assert [row.image_id for row in rows] == ["a"]
    assert _told(log) == [(problems.BAD_TABLE, 3)]
    (tmp_path / "labels.csv").write_bytes("\ufeffimage,labels\né.png,cat\n".encode())
    assert len(_import(_open(kind="table", path=str(tmp_path / "labels.csv")))[0]) == 1


def test_csv_cut_inside_quotes_tells_the_row(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('image,labels\na.png,cat\n"b.p')
    assert _told(_import(_open(kind="table", path=str(tmp_path / "labels.csv")))[1]) == [(problems.BAD_TABLE, 3)]


def test_hashed_splits_are_of_the_id_alone() -> None:
    splits = [hashed_split(str(index), 0.25) for index in range(4000)]
    assert 900 < splits.count("val") < 1100
    assert hashed_split("7", 0.0) == "train"


def test_mask_values_by_meaning(tmp_path: Path) -> None:
    path = _table(tmp_path, "image,labels", "a.png,gland")
    source = _open(kind="table", path=path, mask_values={"background": [0], "gland": [254, 255], "ignore": [9]})
    assert source.classes.mask_values == {0: 0, 254: 1, 255: 1, 9: IGNORE}
    with pytest.raises(ValueError, match="'wolf' is no class"):
        _open(kind="table", path=path, mask_values={"wolf": [1]})
    with pytest.raises(ValueError, match="given twice"):
        _open(kind="table", path=path, mask_values={"background": [1], "gland": [1]})
