"""What a stage could not use: all of it in a table beside the stage's marker, and the first rows in the marker too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster.image_reading import BadRow
from cluster.storage import MissingFileError, Storage
from subcat_core import schemas

QUARANTINE = "quarantine.parquet"
_MAX_IN_MARKER = 1000  # markers are read again and again


def keep_bad(folder: Storage, stage: str, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Write the quarantine of a stage; returns its stats as the marker keeps them.

    stats: of `num_bad`, and `bad`, a list of BadRow; without `bad` nothing is written. The table has schemas.QUARANTINE
    and, where no row is bad, no rows. In the marker `bad` is a list of dicts, the first thousand.
    """
    if "bad" not in stats:
        return dict(stats)
    rows: Sequence[BadRow] = stats["bad"]
    columns = {
        "image_id": [row.image_id for row in rows],
        "uri": [row.uri for row in rows],
        "stage": [stage] * len(rows),
        "reason": [row.reason for row in rows],
    }
    folder.write_table(QUARANTINE, pa.table(columns, schema=schemas.QUARANTINE))
    return {**stats, "bad": [dataclasses.asdict(row) for row in rows[:_MAX_IN_MARKER]]}


def read_bad(folder: Storage, stats: Mapping[str, Any]) -> pa.Table:
    """The quarantine of a finished stage, schemas.QUARANTINE; of a run from before there were tables, its marker's."""
    try:
        return folder.read_table(QUARANTINE, schema=schemas.QUARANTINE)
    except MissingFileError:
        return pa.Table.from_pylist(stats.get("bad") or [], schemas.QUARANTINE)


def told(folder: Storage, stats: Mapping[str, Any]) -> Iterator[str]:
    """Lines that name the bad rows which the marker holds, and the table where there are more. stats: the marker's."""
    for bad in stats["bad"]:
        yield f"  {bad['uri']}: {bad['reason']}"
    num_more = stats["num_bad"] - len(stats["bad"])
    if num_more:
        yield f"  and {num_more} more; {folder.uri(QUARANTINE)} lists all"
