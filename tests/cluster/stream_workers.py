"""Workers for the tests of streams, in a module of their own: actors import them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from cluster.streams import BadRow, ShardOutput


class Doubler:
    """Doubles `value`; rows named in `bad` are quarantined; `fail_on` raises; `die_once` names a flag file."""

    def __init__(self, bad: tuple[str, ...] = (), fail_on: str = "", die_once: str = "", die_on: str = "") -> None:
        self.bad, self.fail_on, self.die_once, self.die_on = bad, fail_on, die_once, die_on

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        rows = inputs["manifest"].to_pylist()
        names = [row["image_id"] for row in rows]
        if self.fail_on in names:
            raise RuntimeError("no such\nluck")
        if self.die_on in names:
            os._exit(1)
        if self.die_once and "image-3" in names and not Path(self.die_once).exists():
            Path(self.die_once).touch()
            os._exit(1)
        good = [row for row in rows if row["image_id"] not in self.bad]
        bad = [BadRow(row["image_id"], f"/{row['image_id']}.jpg", "no JPEG") for row in rows if row not in good]
        table = pa.table(
            {"image_id": [row["image_id"] for row in good], "double": [2 * row["value"] for row in good]},
            schema=pa.schema([("image_id", pa.string()), ("double", pa.int64())]),
        )
        return ShardOutput(table, bad, {"total": sum(table["double"].to_pylist())}, num_rows=len(good))


class Unbuildable:
    """Fails when it is built, as a worker does that is given weights of another architecture."""

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        raise AssertionError("never called")

    def __init__(self) -> None:
        raise ValueError("weights of another architecture; give others")
