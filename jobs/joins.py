"""Join of the tables that stages exchange, on image_id."""

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
