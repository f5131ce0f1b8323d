"""An S3 server that refuses, falls silent or cuts connections for a while: the work goes on, and gives the same."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster import storage as storage_module
from cluster.storage import Storage, StorageError
from cluster.streams import ShardOutput, StreamSettings, map_shards
from cluster.training_rows import write_rows
from tests.cluster.unsteady_server import UnsteadyServer, unsteady_server
from tests.conftest import S3_BUCKET

FAULTS = ("503", "silence", "cut", "cut in the middle")


@pytest.fixture
def server(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnsteadyServer]:
    with unsteady_server(s3_server, monkeypatch) as server:
        yield server


def make_table(num_rows: int = 20_000) -> pa.Table:
    """A narrow column beside one of 4 MB that does not compress."""
    values = np.random.default_rng(0).random(num_rows * 50, np.float32)
    feature = pa.FixedSizeListArray.from_arrays(pa.array(values), 50)
    labels = pa.array([[number % 3] for number in range(num_rows)], pa.list_(pa.int32()))
    return pa.table({"image_id": [f"i{number}" for number in range(num_rows)], "labels": labels, "feature": feature})


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_outlasts_a_fault(server: UnsteadyServer, fault: str, tmp_path: Path) -> None:
    storage, table = Storage(f"s3://{S3_BUCKET}/faults-{fault.replace(' ', '-')}"), make_table(100)
    (tmp_path / "file").write_bytes(b"file" * 1000)
    storage.write_bytes("there", b"there" * 1000)
    storage.write_table("t.parquet", table)

    def written(write: Callable[[], None], name: str) -> bytes:
        write()
        return storage.read_bytes(name)

    requests: list[tuple[Callable[[], Any], Any]] = [
        (lambda: storage.read_bytes("there"), b"there" * 1000),
        (lambda: storage.exists("there"), True),
        (lambda: storage.size("there"), 5000),
        (lambda: written(lambda: storage.write_bytes("new", b"new"), "new"), b"new"),
        (lambda: written(lambda: storage.write_file("copy", tmp_path / "file"), "copy"), b"file" * 1000),
        (lambda: storage.list_names(), ["copy", "new", "t.parquet", "there"]),
        (lambda: storage.read_footer("t.parquet"), (100, table.schema)),
        (lambda: storage.read_table("t.parquet", ["labels", "image_id"]), table.select(["labels", "image_id"])),
    ]
    for request, expected in requests:
        server.fail(fault, 2)
        assert request() == expected
        assert server.num_faults == 0, "the fault was met"


def test_a_server_that_stays_away_is_one_clear_line(server: UnsteadyServer) -> None:
    server.fail("503", 1000)
    with pytest.raises(StorageError, match=r"^s3://subcat-test/x: cannot read: failed 5 times, last with: .*endpoint$"):
        Storage(f"s3://{S3_BUCKET}").read_bytes("x")


class Doubler:
    """Doubles a column, and lets the server fail in the middle of each shard."""

    server: UnsteadyServer | None = None
    fault = ""

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        if self.server is not None:
            self.server.fail(self.fault, 2)
        values = [2 * value for value in inputs["rows"]["value"].to_pylist()]
        return ShardOutput(pa.table({"value": values}), num_rows=len(values))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_goes_on(server: UnsteadyServer, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubler, "fault", fault)
    names = [f"part-{index:05d}" for index in range(3)]
    written = []
    for root in (str(tmp_path), f"s3://{S3_BUCKET}/stage-{fault.replace(' ', '-')}"):
        monkeypatch.setattr(Doubler, "server", None if root == str(tmp_path) else server)
        rows, output = Storage(root).child("rows"), Storage(root).child("out")
        for index, name in enumerate(names):
            rows.write_table(f"{name}.parquet", pa.table({"value": [index, 10 * index]}))
        found = map_shards(Doubler, {}, {"rows": rows}, names, output, StreamSettings(num_actors=0))
        assert [summary.num_rows for summary in found] == [2, 2, 2]
        assert output.list_names() == sorted([f"{name}.{suffix}" for name in names for suffix in ("json", "parquet")])
        written.append([output.read_bytes(f"{name}.parquet") for name in names])
    assert written[0] == written[1]


class Through:
    """Doubles a column in an actor, through the endpoint it is given; from its second shard on the server is away."""

    def __init__(self, endpoint: str, flag: str) -> None:
        os.environ["AWS_ENDPOINT_URL"] = endpoint  # of an actor of this test, which ends with it
        self.flag = Path(flag)

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        values = [2 * value for value in inputs["rows"]["value"].to_pylist()]
        if values[0] == 2:
            self.flag.touch()
            while self.flag.exists():  # until the test has made the server fail
                time.sleep(0.01)
        return ShardOutput(pa.table({"value": values}), num_rows=len(values))


def test_an_outage_in_the_middle_of_a_stage_of_actors(
    ray_cluster: None, s3_server: str, server: UnsteadyServer, tmp_path: Path
) -> None:
    flag = tmp_path / "away"

    def fail() -> None:
        while not flag.exists():
            time.sleep(0.01)
        server.fail("503", 2)
        flag.unlink()

    root = Storage(f"s3://{S3_BUCKET}/actors")
    names = [f"part-{index:05d}" for index in range(4)]
    for index, name in enumerate(names):
        root.write_table(f"rows/{name}.parquet", pa.table({"value": [index, 10 * index]}))
    thread = threading.Thread(target=fail, daemon=True)
    thread.start()
    map_shards(
        Through,
        {"endpoint": server.endpoint, "flag": str(flag)},
        {"rows": root.child("rows")},
        names,
        root.child("out"),
        StreamSettings(num_actors=1),
    )
    thread.join(5)
    assert not thread.is_alive()
    assert server.num_faults == 0, "the outage was met"
    for index, name in enumerate(names):
        assert root.read_table(f"out/{name}.parquet")["value"].to_pylist() == [2 * index, 20 * index]


def test_a_large_object_goes_in_parts(
    server: UnsteadyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(storage_module, "_PART_BYTES", 5 * 2**20)  # the smallest that S3 takes
    data = rng.bytes(12 * 2**20)
    (tmp_path / "large").write_bytes(data)
    for root in (str(tmp_path / "out"), f"s3://{S3_BUCKET}/large"):
        storage = Storage(root)
        storage.write_bytes("a", data)
        storage.write_file("b", tmp_path / "large")
        assert storage.read_bytes("a") == data
        assert storage.read_bytes("b") == data
        with storage.fetch("b") as local:
            assert local.read_bytes() == data
    assert server.num_parts == 6
    server.fail("cut", 1)
    Storage(f"s3://{S3_BUCKET}/large").write_bytes("c", data)
    assert Storage(f"s3://{S3_BUCKET}/large").read_bytes("c") == data


def test_only_the_columns_that_are_asked_for_are_read(server: UnsteadyServer, tmp_path: Path) -> None:
    table = make_table()
    for root in (str(tmp_path), f"s3://{S3_BUCKET}/columns"):
        storage = Storage(root)
        storage.write_table("t.parquet", table)
        assert storage.size("t.parquet") > 3_500_000
        before = server.num_bytes
        assert storage.read_table("t.parquet", ["labels", "image_id"]).equals(table.select(["labels", "image_id"]))
        assert server.num_bytes - before < 400_000
        with pytest.raises(StorageError, match=r"t.parquet: no column cams; the file has image_id, labels, feature$"):
            storage.read_table("t.parquet", ["image_id", "cams"])
        assert storage.read_table("t.parquet", ["feature"]).equals(table.select(["feature"]))


def test_rows_of_a_training_outlast_a_fault(server: UnsteadyServer) -> None:
    table = make_table(1000)
    server.fail("cut", 2)
    file = write_rows(Storage(f"s3://{S3_BUCKET}/rows"), "rows.arrow", [table])
    server.fail("silence", 2)
    with file.open() as rows:
        assert rows.take(np.array([999, 0])).equals(table.take([999, 0]))
