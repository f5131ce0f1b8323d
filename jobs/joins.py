"""Join of the tables that stages exchange, on image_id."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def with_column(rows: pa.Table, other: pa.Table, column: str) -> pa.Table:
    """Rows that `other` knows, in their order, with its `column` appended (of any type, lists too).

    rows, other: tables with image_id, unique in each. Rows that `other` lacks are left out: an earlier stage has
    quarantined them, and counted them there.
    """
    positions = pc.index_in(rows["image_id"], value_set=other["image_id"].combine_chunks())
    known = pc.is_valid(positions)
    return rows.filter(known).append_column(column, other[column].take(positions.filter(known)))


def one_row_an_image(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Rows of one image, each of other classes (features.pool = "region"), joined into one by rising class_index.

    table: image_id, labels (lists of class_index), and `columns`, lists as long as labels. Returns image_id, labels and
    columns, an image where it comes first. A table whose image_ids are unique comes back with its rows as they are.
    """
    table = table.select(["image_id", "labels", *columns])
    ids = table["image_id"].combine_chunks().dictionary_encode()
    if len(ids.dictionary) == table.num_rows:
        return table
    lengths = pc.fill_null(pc.list_value_length(table["labels"]), 0).to_numpy()
    images = np.repeat(ids.indices.to_numpy(), lengths)
    order = np.lexsort((pc.list_flatten(table["labels"]).to_numpy(), images))
    ends = np.cumsum(np.bincount(images, minlength=len(ids.dictionary)))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pc.list_flatten(table[name]).combine_chunks().take(pa.array(order)))
        for name in ("labels", *columns)
    ]
    return pa.table([ids.dictionary, *lists], names=table.column_names)
