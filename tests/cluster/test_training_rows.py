"""Rows for training: any of them in any order, as pyarrow's own take gives them, from memory and from files."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster import training_rows
from cluster.storage import Storage
from cluster.training_rows import RowFile, Rows, open_rows, write_rows


def make_table(num_rows: int) -> pa.Table:
    labels = pa.array([list(range(number % 3)) for number in range(num_rows)], pa.list_(pa.int32()))
    return pa.table({"image_id": [f"i{number}" for number in range(num_rows)], "labels": labels})


def cut(table: pa.Table, size: int) -> list[pa.Table]:
    return [table.slice(start, size) for start in range(0, table.num_rows, size)]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_take_as_pyarrow(size: int, rng: np.random.Generator) -> None:
    table = make_table(100)
    rows = Rows(pa.concat_tables(cut(table, size)))
    for wanted in (np.array([99, 0, 50, 50, 3]), np.array([], np.int64), rng.permutation(100)):
        assert rows.take(wanted).equals(table.take(wanted))
    assert pickle.loads(pickle.dumps(rows)).take(np.array([5])).equals(table.slice(5, 1))


def test_a_file_of_rows(storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "_PIECE_ROWS", 20)
    table, folder = make_table(100), Storage(storage_root)
    file = write_rows(folder, "rows.arrow", iter(cut(table, 7)))
    assert (file.num_rows, file.column_names) == (100, ("image_id", "labels"))
    assert [batch.num_rows for batch in file.batches()] == [21, 21, 21, 21, 16]
    assert pa.Table.from_batches(file.batches()).equals(table)
    with pickle.loads(pickle.dumps(file)).open() as rows:
        assert rows.take(np.array([99, 0, 50])).equals(table.take([99, 0, 50]))
        copy = pickle.dumps(rows)
        assert len(copy) < 1000  # a path, not the rows
        assert pickle.loads(copy).take(np.array([98])).equals(table.slice(98, 1))
    file.delete()
    assert folder.list_names() == []


def test_tables_without_rows(tmp_path: Path) -> None:
    file = write_rows(Storage(str(tmp_path)), "rows.arrow", [make_table(0)])
    assert file == RowFile(Storage(str(tmp_path)), "rows.arrow", 0, ("image_id", "labels"))
    with open_rows(file) as rows, open_rows(None) as none:
        assert rows is not None
        assert (rows.num_rows, none) == (0, None)
