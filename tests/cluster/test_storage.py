"""One set of assertions for a folder and for a real S3 server; full disks, unwritable paths, missing buckets."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import MissingFileError, Storage, StorageError, read_uri
from tests.conftest import S3_BUCKET, mounted_disk

TABLE = pa.table({"image_id": ["a", "b"], "value": pa.array([1, 2], pa.int32())})
SCHEMA = pa.schema([("image_id", pa.string()), ("value", pa.int64())])


@pytest.fixture
def storage(storage_root: str) -> Storage:
    return Storage(storage_root)


def test_bytes_round_trip_and_overwrite(storage: Storage) -> None:
    assert not storage.exists("deep/er/file.bin")
    storage.write_bytes("deep/er/file.bin", b"one")
    assert storage.exists("deep/er/file.bin")
    assert storage.read_bytes("deep/er/file.bin") == b"one"
    storage.write_bytes("deep/er/file.bin", b"twenty-two")
    assert storage.read_bytes("deep/er/file.bin") == b"twenty-two"
    assert storage.size("deep/er/file.bin") == 10
    storage.write_bytes("empty", b"")
    assert storage.read_bytes("empty") == b""


def test_names_with_blanks_and_signs(storage: Storage) -> None:
    for name in ("a b.png", "ä+ü.png", "x=1/y#2.png", "per%20cent.png"):
        storage.write_bytes(name, name.encode())
        assert storage.read_bytes(name) == name.encode()
        assert read_uri(storage.uri(name)) == name.encode()
    assert storage.list_names() == ["a b.png", "per%20cent.png", "ä+ü.png"]


def test_listing_is_of_one_folder_sorted_and_never_stale(storage: Storage) -> None:
    assert storage.list_names("folder") == []
    storage.write_bytes("folder/b", b"")
    storage.write_bytes("folder/sub/c", b"c")
    assert storage.list_names("folder") == ["b"]
    other = Storage(storage.root)  # another object, as another process would hold
    other.write_bytes("folder/a", b"a")
    assert storage.list_names("folder") == ["a", "b"]
    other.delete("folder/b")
    assert storage.list_names("folder") == ["a"]
    assert not storage.exists("folder/b")
    assert storage.exists("folder/sub")


def test_delete(storage: Storage) -> None:
    storage.delete("nothing")
    storage.delete_tree("nothing")
    for name in ("keep", "tree/a", "tree/b/c", "trees"):
        storage.write_bytes(name, b"x")
    storage.delete_tree("tree")
    assert [storage.exists(n) for n in ("keep", "tree/a", "tree/b/c", "tree", "trees")] == [
        True,
        False,
        False,
        False,
        True,
    ]
    for name in ("", ".", storage.root):
        with pytest.raises(ValueError, match="refusing to delete the storage root"):
            storage.delete_tree(name)


def test_missing_files_name_the_uri(storage: Storage) -> None:
    storage.write_bytes("there", b"x")
    for call in (storage.read_bytes, storage.size, storage.read_json, storage.read_table, storage.read_footer):
        with pytest.raises(MissingFileError) as caught:
            call("not/there")
        assert str(caught.value).startswith(storage.uri("not/there") + ": cannot read: no such")
        assert isinstance(caught.value, (StorageError, FileNotFoundError))


def test_json(storage: Storage) -> None:
    storage.write_json("a.json", {"b": [1, None, "ü"]})
    assert storage.read_json("a.json") == {"b": [1, None, "ü"]}
    storage.write_bytes("a.json", b'{"b": [1,')
    with pytest.raises(StorageError, match=r"a\.json: not JSON .*delete the file"):
        storage.read_json("a.json")


def test_tables(storage: Storage) -> None:
    storage.write_table("t/part-00000.parquet", TABLE)
    assert storage.read_table("t/part-00000.parquet") == TABLE
    assert storage.read_footer("t/part-00000.parquet") == (2, TABLE.schema)
    assert storage.read_table("t/part-00000.parquet", columns=["value", "image_id"]).column_names == [
        "value",
        "image_id",
    ]
    assert storage.read_table("t/part-00000.parquet", schema=SCHEMA).schema.field("value").type == pa.int64()
    with pytest.raises(StorageError, match=r"part-00000\.parquet: no column other; the file has image_id, value"):
        storage.read_table("t/part-00000.parquet", columns=["image_id", "other"])
    with pytest.raises(StorageError, match=r"part-00000\.parquet: .*other types"):
        storage.read_table("t/part-00000.parquet", schema=pa.schema([("image_id", pa.int64())]))


@pytest.mark.parametrize("place", ["page", "footer"])
def test_damaged_parquet_names_the_file_and_is_not_asked_for_again(
    storage: Storage, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_table("t.parquet", pa.table({"x": np.random.default_rng(0).random(1000), "y": np.zeros(1000)}))
    data = bytearray(storage.read_bytes("t.parquet"))
    spoiled = slice(2000, 2001) if place == "page" else slice(-400, -350)
    data[spoiled] = bytes(byte ^ 0xFF for byte in data[spoiled])
    storage.write_bytes("t.parquet", bytes(data))
    for columns in (None, ["x"]):
        with pytest.raises(StorageError, match=r"t\.parquet: truncated, not Parquet .*; delete it and run the stage"):
            storage.read_table("t.parquet", columns)
    if place == "footer":
        with pytest.raises(StorageError, match=r"t\.parquet: truncated, not Parquet .*; delete it and run the stage"):
            storage.read_footer("t.parquet")
    assert "again in" not in caplog.text


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_parquet_names_the_file(storage: Storage, keep: int) -> None:
    storage.write_table("t.parquet", TABLE)
    storage.write_bytes("t.parquet", storage.read_bytes("t.parquet")[:keep])
    for read in (storage.read_table, storage.read_footer):
        with pytest.raises(StorageError, match=r"t\.parquet: truncated, not Parquet") as caught:
            read("t.parquet")
        assert "\n" not in str(caught.value)


def test_fetch(storage: Storage) -> None:
    storage.write_bytes("models/m.pt", b"weights" * 1000)
    with storage.fetch("models/m.pt") as local:
        assert local.read_bytes() == b"weights" * 1000
    with pytest.raises(MissingFileError), storage.fetch("models/none.pt"):
        pass


def test_pickles_small_and_works_in_another_process(storage: Storage) -> None:
    storage.write_bytes("x", b"hello")
    data = pickle.dumps(storage.child("folder"))
    assert len(data) < 300
    assert pickle.loads(data) == Storage(storage.root + "/folder")
    code = f"import pickle; print(pickle.loads({pickle.dumps(storage)!r}).read_bytes('x').decode())"
    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert shown.stdout == "hello\n"


def test_check_writable_leaves_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list_names() == []


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("out").root == str(tmp_path / "out")
    assert Storage("file:///a%20b/c/").root == "/a b/c"
    assert Storage("s3://bucket/prefix/").uri("a/b") == "s3://bucket/prefix/a/b"
    assert Storage("s3://bucket").child("x").root == "s3://bucket/x"
    assert Storage("/r").uri("s3://b/k") == "s3://b/k"
    assert Storage("s3://b").uri("/abs") == "/abs"
    with pytest.raises(ValueError, match="leaves its root"):
        Storage("/r").uri("../x")
    for bad in ("gs://bucket/x", "https://host/x", "", "s3://"):
        with pytest.raises(ValueError, match="give"):
            Storage(bad)
    with pytest.raises(ValueError, match="is relative; give an absolute path"):
        read_uri("images/a.jpg")


# ---- local disks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    with mounted_disk(tmp_path / "tiny", "256k") as folder:
        yield folder


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tiny_disk: Path) -> None:
    storage = Storage(str(tiny_disk / "out"))
    storage.write_bytes("kept", b"old")
    table = pa.table({"x": np.random.default_rng(0).random(1 << 17)})
    for write in (
        lambda: storage.write_bytes("kept", bytes(1 << 20)),
        lambda: storage.write_table("kept", table),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert str(caught.value) == (
            f"{tiny_disk}/out/kept: cannot write: the disk is full; free space or choose another output folder"
        )
    assert storage.read_bytes("kept") == b"old"
    assert names(tiny_disk / "out") == ["kept"]


def test_a_full_disk_without_mounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        Storage(str(tmp_path)).write_bytes("x", b"data")
    assert names(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    cases = {
        str(tmp_path / "file" / "x"): "a file stands where a folder is needed",
        str(tmp_path / "folder"): "this is a folder, and a file is needed",
        "/proc/subcat/x": "cannot be made; choose another one",
    }
    for path, reason in cases.items():
        with pytest.raises(StorageError) as caught:
            Storage("/").write_bytes(path, b"data")
        assert str(caught.value).startswith(f"{path}: cannot write: ")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]
    with pytest.raises(StorageError, match="cannot write"):
        Storage("/proc/subcat").check_writable()


def test_left_temporary_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".0123.tmp").write_bytes(b"half")
    (tmp_path / "whole").write_bytes(b"whole")
    assert Storage(str(tmp_path)).list_names() == ["whole"]


# ---- S3


def test_a_missing_bucket_is_one_clear_line(s3_server: str) -> None:
    storage = Storage("s3://no-such-bucket/prefix")
    calls = (
        lambda: storage.read_bytes("x"),
        lambda: storage.write_bytes("x", b"data"),
        lambda: storage.exists("x"),
        lambda: storage.list_names("x"),
    )
    for call in calls:
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket: no such bucket; create it or check the name"):
            call()


def run_python(code: str, **environment: str) -> str:
    """stdout and stderr of a child with the S3 server's environment, changed."""
    result = subprocess.run(
        [sys.executable, "-c", f"from cluster.storage import Storage, StorageError\ntry:\n    {code}\n"
         "except StorageError as error:\n    print(error)"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        check=True,
    )  # fmt: skip
    return result.stdout + result.stderr


def test_no_credentials_is_one_clear_line(s3_server: str, tmp_path: Path) -> None:
    nothing = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }
    shown = run_python(f"Storage('s3://{S3_BUCKET}').read_bytes('x')", **nothing)
    assert shown.startswith(f"s3://{S3_BUCKET}/x: cannot read: no AWS credentials found; set AWS_ACCESS_KEY_ID and")
    assert shown.count("\n") == 1
    wrong = run_python(f"Storage('s3://{S3_BUCKET}').read_bytes('x')", AWS_SECRET_ACCESS_KEY="another-secret")
    assert wrong.startswith(f"s3://{S3_BUCKET}/x: cannot read: access denied (")
    assert "another-secret" not in wrong
    assert wrong.count("\n") == 1


def test_profile_and_endpoint_from_the_files_of_aws(s3_server: str, tmp_path: Path) -> None:
    Storage(f"s3://{S3_BUCKET}").write_bytes("from-profile", b"yes")
    keys = f"aws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = "
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}{os.environ['AWS_SECRET_ACCESS_KEY']}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {s3_server}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_PROFILE": "lab",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }
    code = f"from cluster.storage import Storage; print(Storage('s3://{S3_BUCKET}').read_bytes('from-profile'))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert shown.stdout == "b'yes'\n", shown.stderr


def test_an_endpoint_that_does_not_answer(s3_server: str) -> None:
    shown = run_python(f"Storage('s3://{S3_BUCKET}').check_writable()", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert ".tmp: cannot write: failed 5 times, last with: Could not connect to the endpoint URL" in shown
    assert shown.splitlines()[0].endswith("check the S3 endpoint")
    assert shown.count("again in") == 4
