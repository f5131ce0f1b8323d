"""The join keeps the order of the rows, carries lists, and leaves out what the other table lacks."""

import pyarrow as pa

from jobs.joins import with_column


def test_join_by_hand() -> None:
    rows = pa.table({"image_id": ["c", "a", "x", "b"], "uri": ["3", "1", "9", "2"]})
    other = pa.table({"image_id": ["a", "b", "c", "d"], "cluster_ids": [[0], [1, 2], [], [3]]})
    joined = with_column(rows, other, "cluster_ids")
    assert joined.to_pydict() == {"image_id": ["c", "a", "b"], "uri": ["3", "1", "2"], "cluster_ids": [[], [0], [1, 2]]}


def test_nothing_in_common_is_an_empty_table() -> None:
    rows = pa.table({"image_id": ["a"]})
    other = pa.table({"image_id": pa.array([], pa.string()), "value": pa.array([], pa.int32())})
    assert with_column(rows, other, "value").num_rows == 0
