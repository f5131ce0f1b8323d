"""A stage's time over images N and actors P: `python -m benchmarks.time_model [--quick] [--json FILE]`.

Fits t(N, P) = a + c N / P + r log2(P) to runs through Ray with a worker that waits 20 ms an image in place of working:
so P may be more than the cores, and what is fitted beside c, which must come out near 20 ms, is the cost of Ray itself.
Runs of a stage that works fill c in from `benchmarks.growth`. Wall time; the order of the runs is shuffled.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import finish, measure, parser, table
from cluster.runtime import ClusterSettings, start_ray
from cluster.storage import Storage
from cluster.streams import ShardOutput, StreamSettings, map_shards

ACTORS, SHARDS, TURNS = (1, 2, 4), (16, 32, 64), 2
QUICK_ACTORS, QUICK_SHARDS = (1, 2), (2, 4)
ROWS_PER_SHARD, IMAGE_S = 16, 0.02


class Wait:
    """Waits IMAGE_S a row."""

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        rows = inputs["rows"]
        time.sleep(IMAGE_S * rows.num_rows)
        return ShardOutput(rows, num_rows=rows.num_rows)


def run(folder: Path, num_shards: int, num_actors: int) -> None:
    """All shards."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        map_shards(
            Wait,
            {},
            inputs={"rows": Storage(str(folder / "rows"))},
            shards=[f"part-{index:05d}" for index in range(num_shards)],
            output=Storage(output),
            settings=StreamSettings(num_actors=num_actors),
        )


def fit(records: list[dict[str, Any]]) -> dict[str, float]:
    """a, c, r in seconds, and rms_s of what the model leaves; records: num_images, num_actors, wall_s."""
    images, actors, seconds = (np.array([each[k] for each in records]) for k in ("num_images", "num_actors", "wall_s"))
    terms = np.stack([np.ones(len(images)), images / actors, np.log2(actors)], axis=1)
    found = np.linalg.lstsq(terms, seconds, rcond=None)[0]
    rest = seconds - terms @ found
    return {
        **dict(zip(("a_s", "c_s", "r_s"), map(float, found), strict=True)),
        "rms_s": float(np.sqrt((rest**2).mean())),
    }


def model(found: dict[str, float], num_images: float, num_actors: float) -> float:
    """Seconds by a fit."""
    return found["a_s"] + found["c_s"] * num_images / num_actors + found["r_s"] * math.log2(num_actors)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    actors, shards = (QUICK_ACTORS, QUICK_SHARDS) if arguments.quick else (ACTORS, SHARDS)
    plan = [(p, n) for p in actors for n in shards for _ in range(1 if arguments.quick else TURNS)]
    random.Random(0).shuffle(plan)
    records = []
    with (
        tempfile.TemporaryDirectory(prefix="subcat-model-") as name,
        start_ray(ClusterSettings(num_cpus=max(actors) + 1, num_gpus=0, object_store_bytes=200_000_000)),
    ):
        for index in range(max(shards)):
            rows = pa.table({"number": range(ROWS_PER_SHARD)})
            Storage(name).write_table(f"rows/part-{index:05d}.parquet", rows)
        run(Path(name), 2, 1)
        for num_actors, num_shards in plan:
            sample, _ = measure(lambda p=num_actors, n=num_shards: run(Path(name), n, p))
            records.append(
                {"num_images": num_shards * ROWS_PER_SHARD, "num_actors": num_actors, "wall_s": sample.wall_s}
            )
    found = fit(records)
    records.sort(key=lambda each: (each["num_actors"], each["num_images"]))
    modelled = [
        found["a_s"]
        + found["c_s"] * each["num_images"] / each["num_actors"]
        + found["r_s"] * np.log2(each["num_actors"])
        for each in records
    ]
    rows = [[*each.values(), float(value)] for each, value in zip(records, modelled, strict=True)]
    shown = table(["images", "actors", "wall s", "model s"], rows)
    shown += (
        f"\na = {found['a_s']:.2f} s, c = {1e3 * found['c_s']:.2f} ms an image ({1e3 * IMAGE_S:.0f} of it waiting), "
    )
    shown += f"r = {found['r_s']:.2f} s; rest {found['rms_s']:.2f} s"
    finish("time_model", {"records": records, "fit": found, "image_s": IMAGE_S}, shown, [], arguments.json)


if __name__ == "__main__":
    main()
