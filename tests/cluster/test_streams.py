"""map_shards in process and on Ray: same bytes, order, resume, bad rows, failing and dying workers; iter_images."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import BadRow, ShardError, ShardSummary, StreamSettings, iter_images, map_shards
from tests.cluster.stream_workers import Doubler, Unbuildable

HERE, ON_RAY = StreamSettings(num_actors=0), StreamSettings(num_actors=2)


def make_manifest(root: Storage, num_shards: int = 4, rows: int = 3) -> list[str]:
    """Shards of images image-0, image-1, ... with value = their number."""
    names = []
    for shard in range(num_shards):
        numbers = list(range(shard * rows, (shard + 1) * rows))
        names.append(f"part-{shard:05d}")
        table = pa.table({"image_id": [f"image-{n}" for n in numbers], "value": numbers, "unused": numbers})
        root.child("manifest").write_table(f"{names[-1]}.parquet", table)
    return names


def run(
    root: Storage, shards: list[str], settings: StreamSettings, output: str = "out", **kwargs: object
) -> list[ShardSummary]:
    return map_shards(
        Doubler,
        kwargs,
        inputs={"manifest": root.child("manifest")},
        columns={"manifest": ["image_id", "value"]},
        shards=shards,
        output=root.child(output),
        settings=settings,
        stage="double",
    )


def test_in_process_values(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    summaries = run(root, make_manifest(root, num_shards=2), HERE)
    assert [s.name for s in summaries] == ["part-00000", "part-00001"]
    assert [s.stats["total"] for s in summaries] == [2 * (0 + 1 + 2), 2 * (3 + 4 + 5)]
    assert [s.num_rows for s in summaries] == [3, 3]
    assert all(s.seconds > 0 and s.peak_rss_bytes > 10_000_000 for s in summaries)
    assert root.read_table("out/part-00001.parquet").to_pydict() == {
        "image_id": ["image-3", "image-4", "image-5"],
        "double": [6, 8, 10],
    }


def test_ray_gives_the_bytes_of_in_process(
    ray_cluster: None, storage_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.streams._SPAN_SHARDS", 3)  # of four shards: two executions of Ray Data
    root = Storage(storage_root)
    shards = make_manifest(root)
    here = run(root, shards, HERE, "here")
    far = run(root, shards, ON_RAY, "far")
    assert [s.name for s in far] == shards
    assert [(s.stats, s.num_rows, s.bad) for s in far] == [(s.stats, s.num_rows, s.bad) for s in here]
    for name in shards:
        assert root.read_bytes(f"far/{name}.parquet") == root.read_bytes(f"here/{name}.parquet")
    assert root.list_names("far") == sorted([f"{n}.parquet" for n in shards] + [f"{n}.json" for n in shards])


def test_the_bar_moves_as_results_arrive_and_counts_rows(tmp_path: Path) -> None:
    root, stream = Storage(str(tmp_path)), io.StringIO()
    shards = make_manifest(root)
    with Progress(stream).stage("double", total=12) as bar:
        map_shards(
            Doubler, {}, {"manifest": root.child("manifest")}, shards, root.child("out"), HERE, bar=bar, stage="double"
        )
        assert bar.num_done == 12
    assert "double: 12/12 images in" in stream.getvalue()


@pytest.mark.parametrize("settings", [HERE, ON_RAY])
def test_finished_shards_are_skipped(ray_cluster: None, tmp_path: Path, settings: StreamSettings) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root)
    run(root, shards[:2], HERE)
    before = root.read_bytes("out/part-00000.json")
    root.delete("out/part-00001.json")  # killed between table and summary: not finished
    summaries = run(root, shards, settings)
    assert [s.stats["total"] for s in summaries] == [6, 24, 42, 60]
    assert root.read_bytes("out/part-00000.json") == before


@pytest.mark.parametrize("settings", [HERE, ON_RAY])
def test_an_error_in_a_worker_is_one_line_with_the_shard(
    ray_cluster: None, tmp_path: Path, settings: StreamSettings
) -> None:
    root = Storage(str(tmp_path))
    with pytest.raises(ShardError) as caught:
        run(root, make_manifest(root), settings, fail_on="image-4")
    assert str(caught.value) == "double: shard part-00001: RuntimeError: no such luck"
    assert "stream_workers.py" in str(caught.value.__cause__)
    assert not root.exists("out/part-00001.json")
    assert [s.stats["total"] for s in run(root, make_manifest(root), settings)] == [6, 24, 42, 60]


def test_a_worker_that_cannot_be_built_is_one_line(ray_cluster: None, tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root, 1)
    with pytest.raises(ShardError, match=r"^double: shard part-00000: weights of another architecture; give others$"):
        map_shards(
            Unbuildable, {}, {"manifest": root.child("manifest")}, shards, root.child("out"), ON_RAY, stage="double"
        )


def test_a_truncated_input_names_the_file(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root)
    data = root.read_bytes("manifest/part-00002.parquet")
    root.write_bytes("manifest/part-00002.parquet", data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"shard part-00002: .*manifest/part-00002\.parquet: truncated"):
        run(root, shards, HERE)


def test_bad_rows_are_kept_and_limited(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root)
    tolerant = StreamSettings(num_actors=0, max_bad_frac=0.1)
    summaries = run(root, shards, tolerant, bad=("image-7",))
    assert summaries[2].bad == [BadRow("image-7", "/image-7.jpg", "no JPEG")]
    assert run(root, shards, tolerant)[2].bad == summaries[2].bad  # from the summaries that were written
    with pytest.raises(
        ValueError, match=r"double: 1 of 12 images are bad, more than stream.max_bad_frac = 0.02"
    ) as caught:
        run(root, shards, HERE)
    assert "image-7 (/image-7.jpg): no JPEG; mend or remove them" in str(caught.value)
    assert not root.exists("out/part-00002.json")
    assert not any(s.bad for s in run(root, shards, HERE))  # mended meanwhile: read again


def test_the_limit_stops_early_when_the_total_is_known(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root)
    every = tuple(f"image-{n}" for n in range(12))
    with (
        Progress(io.StringIO()).stage("double", total=12) as bar,
        pytest.raises(ValueError, match="3 of 3 images are bad"),
    ):
        map_shards(
            Doubler, {"bad": every}, {"manifest": root.child("manifest")}, shards, root.child("out"), HERE, bar=bar
        )


def test_a_dying_actor_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    root, flag = Storage(str(tmp_path)), tmp_path / "died"
    shards = make_manifest(root)
    summaries = run(root, shards, ON_RAY, die_once=str(flag))
    assert flag.exists()
    assert [s.stats["total"] for s in summaries] == [6, 24, 42, 60]


def test_an_actor_that_always_dies_ends_the_stage(ray_cluster: None, tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root, 2)
    with pytest.raises(ShardError, match="double: a worker process died again and again, at one of shards part-0000"):
        run(root, shards, ON_RAY, die_on="image-4")


def test_actors_are_gone_after_a_stage(ray_cluster: None, tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    with pytest.raises(ShardError):
        run(root, make_manifest(root), ON_RAY, fail_on="image-0")
    deadline_s = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline_s, "the actors of a failed stage still hold their CPUs"
        time.sleep(0.1)


def test_too_many_actors_is_an_error_and_not_a_wait(ray_cluster: None, tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    shards = make_manifest(root, num_shards=9, rows=1)
    with pytest.raises(ValueError, match=r"9 actors need 9 CPUs and 0 GPUs, and the cluster has 8 .*stream.num_actors"):
        run(root, shards, StreamSettings(num_actors=9))


def write_image(path: Path, value: int) -> str:
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(path)
    return str(path)


def test_iter_images_in_order_with_bad_rows(tmp_path: Path) -> None:
    uris = [write_image(tmp_path / f"{n}.png", n) for n in range(20)]
    (tmp_path / "5.png").write_bytes(b"not a picture")
    (tmp_path / "6.png").unlink()
    rows = pa.table({"image_id": [str(n) for n in range(20)], "uri": uris})
    seen = list(iter_images(rows, num_threads=3))
    assert [row["image_id"] for row, _ in seen] == [str(n) for n in range(20)]
    for (row, image), number in zip(seen, range(20), strict=True):
        if number in (5, 6):
            assert isinstance(image, BadRow)
            assert (image.image_id, image.uri) == (str(number), row["uri"])
            assert image.reason
        else:
            assert isinstance(image, np.ndarray)
            assert image.shape == (4, 6, 3)
            assert (image == number).all()


def test_iter_images_works_ahead_by_a_bounded_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    lock = threading.Lock()

    def read(row: dict) -> np.ndarray:
        with lock:
            started.append(row["image_id"])
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr("cluster.image_reading.read_image", read)
    rows = pa.table({"image_id": [str(n) for n in range(1000)], "uri": ["/none"] * 1000})
    images = iter_images(rows, num_threads=2)
    for _ in range(10):
        next(images)
    time.sleep(0.1)
    assert len(started) <= 10 + 2 * 2
    images.close()  # type: ignore[attr-defined]
    assert len(started) < 1000
