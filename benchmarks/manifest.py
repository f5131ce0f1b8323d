"""Manifests of up to ten million rows: `python -m benchmarks.manifest [--rows 100000 1000000] [--quick] [--json FILE]`.

For each number of rows, a Parquet table is drawn and taken through what the driver does with it, each step in a fresh
process: `import` (parse, check, find duplicate ids, write shards), `index` (what prepare keeps of its shards), `join`
(sub-categories joined to the rows, written as the file that trainings read), `batches` (200 random batches of 16 rows
from that file). No image is read. Time is CPU time; memory is the peak of the process above one that only imports the
same modules. Kept where the time grows at most as N ** 1.1 and the driver stays below 1 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import exponent, finish, in_child, parser, peak_bytes, table
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import ShardSummary
from cluster.training_rows import RowFile, write_rows
from jobs import prepare
from jobs.importers import TableSource, open_source
from jobs.joins import one_row_an_image, with_column
from jobs.manifest import Manifest, ShardEntry
from jobs.prepare import PrepareSettings
from subcat_core import schemas
from subcat_core.classes import ClassTable

CLASSES = tuple(f"class{index:02d}" for index in range(20))
SIZES, QUICK_SIZES = (100_000, 1_000_000), (5_000, 20_000)
ROWS_PER_SHARD = 1024
NUM_BATCHES, BATCH_ROWS = 200, 16
MAX_EXPONENT, MAX_BYTES = 1.1, 1e9
_DRAWN_ROWS = 100_000
_COLUMNS = ["image_id", "uri", "labels"]


def draw(path: str, num_rows: int) -> None:
    """A Parquet table of images with 1.5 tags each, one in ten of split val."""
    rng = np.random.default_rng(0)
    names = np.array(CLASSES)
    schema = pa.schema([(name, pa.string()) for name in ("image_id", "image", "labels", "split")])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, _DRAWN_ROWS):
            ids = [f"image-{number:09d}" for number in range(start, min(start + _DRAWN_ROWS, num_rows))]
            tags = names[rng.integers(0, len(names), (len(ids), 2))]
            both = rng.random(len(ids)) < 0.5
            columns = [
                ids,
                [f"s3://bucket/data/images/{image_id}.jpg" for image_id in ids],
                [f"{a};{b}" if two else a for (a, b), two in zip(tags.tolist(), both, strict=True)],
                np.where(rng.random(len(ids)) < 0.1, "val", "train").tolist(),
            ]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))


def import_rows(table_path: str, folder: str) -> list[ShardEntry]:
    """The import of `prepare`; returns its shards."""
    settings = PrepareSettings(source=TableSource(path=table_path, classes=CLASSES), rows_per_shard=ROWS_PER_SHARD)
    with Progress().stage("import", unit="rows") as bar:
        imported = prepare.import_rows(open_source(settings.source), Storage(folder), settings, bar)
    return [ShardEntry(**entry) for entry in imported["shards"]]


def index_shards(table_path: str, folder: str, shards: list[ShardEntry]) -> int:
    """What `prepare` does with the summaries of its shards; returns the number of images."""
    source = open_source(TableSource(path=table_path, classes=CLASSES))
    tally = prepare.Tally(source, shards)
    for shard in shards:
        stats = {"class_counts": [1] * len(CLASSES), "num_masks": 0, "digest": "0" * 64, "places": []}
        tally.add(ShardSummary(shard.name, shard.num_rows, [], stats, 0.1, 0, shard.num_rows))
    found = prepare.write_results(Storage(folder), tally, [])
    return sum(split["images"] for split in found["splits"].values())


def write_subcategories(manifest: Manifest, folder: Storage) -> None:
    """A cluster id for each tag of each training image, as `cluster_features` writes them."""
    for shard in manifest.shards:
        rows = manifest.folder.read_table(f"{shard.name}.parquet", ["image_id", "labels"])
        distances = pa.array([[1.0] * len(labels) for labels in rows["labels"].to_pylist()], pa.list_(pa.float32()))
        columns = [rows["image_id"], rows["labels"], rows["labels"], distances]
        folder.write_table(f"{shard.name}.parquet", pa.table(columns, schema=schemas.SUBCATEGORIES))


def join_rows(folder: str, clusters: str, shards: list[ShardEntry]) -> RowFile:
    """What `train_classifier` does before a round with sub-categories."""
    storage = Storage(clusters)

    def with_clusters(name: str, rows: pa.Table) -> pa.Table:
        found = storage.read_table(f"{name}.parquet", ["image_id", "labels", "cluster_ids"])
        return with_column(rows, one_row_an_image(found, ["cluster_ids"]), "cluster_ids")

    manifest = Manifest(ClassTable(CLASSES), shards, "", Storage(folder))
    return write_rows(storage, "rows.arrow", manifest.joined("train", _COLUMNS, with_clusters))


def read_batches(file: RowFile) -> int:
    """Random batches, as every rank of a training reads them."""
    rng = np.random.default_rng(0)
    num_labels = 0
    with file.open() as rows:
        for _ in range(NUM_BATCHES):
            batch = rows.take(rng.integers(0, file.num_rows, BATCH_ROWS)).to_pylist()
            num_labels += sum(len(row["labels"]) for row in batch)
    return num_labels


def steps(folder: Path, num_rows: int) -> Iterator[dict[str, Any]]:
    """One record a step: step, num_rows, cpu_s, wall_s, peak_bytes."""
    table_path, raw, clusters = str(folder / "table.parquet"), str(folder / "raw"), str(folder / "clusters")

    def record(step: str, sample: Any, peak: int) -> dict[str, Any]:
        times = {"cpu_s": sample.cpu_s, "wall_s": sample.wall_s}
        return {"step": step, "num_rows": num_rows, **times, "peak_bytes": peak}

    draw(table_path, num_rows)
    shards, *measured = in_child(import_rows, table_path, raw)
    yield record("import", *measured)
    num_images, *measured = in_child(index_shards, table_path, raw, shards)
    assert num_images == num_rows, (num_images, num_rows)
    yield record("index", *measured)
    write_subcategories(Manifest(ClassTable(CLASSES), shards, "", Storage(raw)), Storage(clusters))
    file, *measured = in_child(join_rows, raw, clusters, shards)
    yield record("join", *measured)
    _, *measured = in_child(read_batches, file)
    yield record("batches", *measured)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", help="numbers of rows")
    arguments = options.parse_args()
    sizes = arguments.rows or (QUICK_SIZES if arguments.quick else SIZES)
    base, _, _ = in_child(peak_bytes)
    records = []
    for num_rows in sizes:
        with tempfile.TemporaryDirectory(prefix="subcat-manifest-") as folder:
            for each in steps(Path(folder), num_rows):
                records.append(each)
                print(f"{num_rows:,} rows: {each['step']}: {each['cpu_s']:.2f} s of CPU time", flush=True)
    shown = table(
        ["rows", "step", "CPU s", "us a row", "wall s", "peak MB", "above imports, MB"],
        [
            [
                *(each["num_rows"], each["step"], each["cpu_s"], 1e6 * each["cpu_s"] / each["num_rows"]),
                *(each["wall_s"], each["peak_bytes"] / 1e6, (each["peak_bytes"] - base) / 1e6),
            ]
            for each in records
        ],
    )
    exponents, failures = {}, []
    for step in ("import", "join"):
        of_step = [each for each in records if each["step"] == step]
        if len(of_step) > 1:
            exponents[step] = exponent([each["num_rows"] for each in of_step], [each["cpu_s"] for each in of_step])
            if not arguments.quick and exponents[step] > MAX_EXPONENT:
                failures.append(f"{step}: time grows as N ** {exponents[step]:.2f}")
    failures += [
        f"{each['step']}: {(each['peak_bytes'] - base) / 1e6:.0f} MB at {each['num_rows']:,} rows"
        for each in records
        if each["peak_bytes"] - base > MAX_BYTES
    ]
    shown += "\n" + ", ".join(f"{step}: time as N ** {value:.2f}" for step, value in exponents.items())
    numbers = {"records": records, "base_bytes": base, "exponents": exponents}
    finish("manifest", numbers, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
