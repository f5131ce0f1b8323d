"""A stage through Ray against a plain loop over the same shards: `python -m benchmarks.stage_overhead [--quick]`.

The worker does 20 ms of CPU work an image (a matrix product), reads its shard and writes a table, as stages do. Both
sides run over M and over 3M shards in turns, in wall time: the difference is the steady state, what is left of the
smaller one is the fixed cost. One actor beside one loop, so no gain by spreading is hidden in the ratio.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.harness import Comparison, finish, interleave, parser, table
from cluster.runtime import ClusterSettings, start_ray
from cluster.storage import Storage
from cluster.streams import ShardOutput, StreamSettings, map_shards

NUM_SHARDS, ROWS_PER_SHARD, TURNS = 10, 16, 5
MIN_RATE_RATIO, MAX_FIXED_S = 0.90, 8.0
IMAGE_S = 0.02


class Work:
    """Turns a shard into one number a row, at about 20 ms of CPU time each."""

    def __init__(self, num_products: int) -> None:
        self.num_products = num_products
        self.matrix = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32) / 12

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        values = []
        for row in inputs["rows"].to_pylist():
            product = self.matrix * row["number"]
            for _ in range(self.num_products):
                product = product @ self.matrix
            values.append(float(product[0, 0]))
        table = pa.table({"number": inputs["rows"]["number"], "value": values})
        return ShardOutput(table, num_rows=table.num_rows)


def calibrate() -> int:
    """Products that take IMAGE_S."""
    table = pa.table({"number": [1]})
    work, started = Work(2000), time.process_time()
    work({"rows": table})
    return max(1, round(2000 * IMAGE_S / (time.process_time() - started)))


def run(folder: Path, num_shards: int, num_products: int, num_actors: int) -> bytes:
    """All shards; returns the bytes of the last output, which are the same for both sides."""
    names = [f"part-{index:05d}" for index in range(num_shards)]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        map_shards(
            Work,
            {"num_products": num_products},
            inputs={"rows": Storage(str(folder / "rows"))},
            shards=names,
            output=Storage(output),
            settings=StreamSettings(num_actors=num_actors),
        )
        return (Path(output) / f"{names[-1]}.parquet").read_bytes()


def split(comparison: Comparison, side: str, num_shards: int) -> tuple[float, float]:
    """(fixed seconds, seconds a shard) in wall time, medians over the turns."""
    small, large = (comparison.samples[f"{side}, {size} shards"] for size in (num_shards, 3 * num_shards))
    slopes = [(b.wall_s - a.wall_s) / (2 * num_shards) for a, b in zip(small, large, strict=True)]
    per_shard = statistics.median(slopes)
    return statistics.median(a.wall_s - num_shards * per_shard for a in small), per_shard


def main() -> None:
    arguments = parser(__doc__).parse_args()
    num_shards, turns = (2, 1) if arguments.quick else (NUM_SHARDS, TURNS)
    num_products = calibrate()
    with (
        tempfile.TemporaryDirectory(prefix="subcat-overhead-") as name,
        start_ray(ClusterSettings(num_cpus=2, num_gpus=0, object_store_bytes=200_000_000)),
    ):
        folder = Path(name)
        for index in range(3 * num_shards):
            rows = pa.table({"number": range(index * ROWS_PER_SHARD, (index + 1) * ROWS_PER_SHARD)})
            Storage(name).write_table(f"rows/part-{index:05d}.parquet", rows)
        sides = {
            f"{side}, {size} shards": lambda size=size, actors=actors: run(folder, size, num_products, actors)
            for size in (num_shards, 3 * num_shards)
            for side, actors in (("loop", 0), ("Ray", 1))
        }

        def check(results: dict[str, bytes]) -> None:
            for size in (num_shards, 3 * num_shards):
                assert results[f"loop, {size} shards"] == results[f"Ray, {size} shards"], "other bytes through Ray"

        comparison = interleave(sides, turns, check=check)
    fitted = {side: split(comparison, side, num_shards) for side in ("loop", "Ray")}
    rate, fixed_s = fitted["loop"][1] / fitted["Ray"][1], fitted["Ray"][0] - fitted["loop"][0]
    shown = table(
        ["side", "fixed s", "ms an image, steady"],
        [[side, start, 1e3 * per_shard / ROWS_PER_SHARD] for side, (start, per_shard) in fitted.items()],
    )
    shown += f"\nrate through Ray / rate of the loop: {rate:.3f}; fixed cost of Ray: {fixed_s:.1f} s a stage"
    failures = []
    if not arguments.quick:
        failures += [f"rate {rate:.3f} below {MIN_RATE_RATIO}"] if rate < MIN_RATE_RATIO else []
        failures += [f"fixed cost {fixed_s:.1f} s above {MAX_FIXED_S}"] if fixed_s > MAX_FIXED_S else []
    numbers = {"rate_ratio": rate, "fixed_s": fixed_s, "image_s": IMAGE_S, "samples": comparison.to_json()}
    finish("stage_overhead", numbers, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
