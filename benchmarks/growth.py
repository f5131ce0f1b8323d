"""Stages over N, 2N, 4N, 8N images: `python -m benchmarks.growth [--images 64] [--ray] [--quick] [--json FILE]`.

A whole small run (48 x 48 px pictures of discs, a MobileNet without weights, one round of sub-categories) for each N,
each in a fresh process; the seconds of a stage are CPU seconds of that process, in which all of its work is done. With
--ray the stages that go shard by shard run on one Ray actor: then the memory of the driver and of the worker is what
to read, and seconds are wall time. Kept where the time of each stage grows at most as N ** 1.1 (the fixed part of it,
such as building the network, is in it and makes it less) and the memory of the driver and, with --ray, of the worker of
each stage by at most a tenth from N to 8N.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import exponent, finish, in_child, line, parser, peak_bytes, table
from cluster.progress import Progress
from cluster.runtime import ClusterSettings, start_ray
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import pipeline
from jobs.config import parse_experiment
from jobs.context import StageContext

NUM_IMAGES, QUICK_IMAGES = 64, 8
FACTORS, QUICK_FACTORS = (1, 2, 4, 8), (1, 2)
MAX_EXPONENT, MAX_MEMORY_RATIO = 1.1, 1.1
SIDE_PX, ROWS_PER_SHARD = 48, 16
STREAMING = ("prepare", "extract_features", "make_cams", "make_pseudo_masks", "predict", "evaluate")


def draw(folder: Path, num_images: int) -> str:
    """Discs and squares on noise, three in four of split train, all with a mask; returns the table that lists them."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = ["image,labels,split,mask"]
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] - SIDE_PX // 2
    shapes = {"disc": y**2 + x**2 <= 150, "square": np.maximum(abs(y), abs(x)) <= 10}
    for index in range(num_images):
        name = ("disc", "square")[index % 2]
        image = rng.integers(90, 130, (SIDE_PX, SIDE_PX, 3), np.uint8)
        image[shapes[name]] = (220, 60, 50) if name == "disc" else (40, 80, 220)
        mask = shapes[name].astype(np.uint8) * (1 + index % 2)
        Image.fromarray(image).save(folder / "images" / f"{index:06d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index:06d}.png")
        split = "val" if index % 4 == 3 else "train"
        lines.append(f"images/{index:06d}.png,{name},{split},masks/{index:06d}.png")
    path = folder / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def values(table_path: str, output: str, num_actors: int) -> dict[str, Any]:
    """The experiment."""
    backbone = {"name": "timm:mobilenetv2_050", "weights": "none", "output_stride": 16}
    augment = {"resize_min_px": SIDE_PX, "resize_max_px": SIDE_PX, "crop_px": SIDE_PX}
    optimiser = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "freeze_batch_norm": False}
    compute = {"num_workers": 0, "num_decode_workers": 0}
    return {
        "name": "growth",
        "output": output,
        "rounds": 1,
        "prepare": {"source": {"kind": "table", "path": table_path}, "rows_per_shard": ROWS_PER_SHARD},
        "classifier": {"backbone": backbone, "augment": augment, "optimiser": optimiser, "compute": compute},
        "kmeans": {"num_clusters": 2, "num_restarts": 2},
        "cams": {"cam": {"scales": [1.0], "flip": False}},
        "pseudo_masks": {"mask": {"min_confidence": 0.0}},
        "segmenter": {
            "model": {"architecture": "deeplabv2", "backbone": backbone},
            "augment": augment,
            "optimiser": optimiser,
            "compute": compute,
        },
        "stream": {"num_actors": num_actors},
        "tracking": {"enabled": False},
    }


def run(num_images: int, on_ray: bool) -> dict[str, Any]:
    """A whole run: stage -> seconds (of rounds, the first), driver_bytes and worker_bytes."""
    with tempfile.TemporaryDirectory(prefix="subcat-growth-") as folder:
        output = f"{folder}/out"
        table_path = draw(Path(folder) / "data", num_images)
        experiment = parse_experiment(values(table_path, output, num_actors=int(on_ray)))
        context = StageContext(
            experiment, Storage(output), Progress(), Tracker(experiment.tracking, Storage(output), "growth")
        )
        if not on_ray:
            return _run(context, time.process_time)
        with start_ray(ClusterSettings(num_cpus=2, num_gpus=0, object_store_bytes=200_000_000)):
            return _run(context, time.perf_counter)


def _run(context: StageContext, clock: Any) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    started = clock()
    for stage in pipeline.run_stages(context):
        ended = clock()
        seconds.setdefault(stage, ended - started)
        started = ended
        if stage == "evaluate":
            break
    folders = {step.stage: step.folder for step in reversed(pipeline.plan(context.experiment))}
    stats = {stage: context.storage.read_json(f"{folders[stage]}/marker.json")["stats"] for stage in STREAMING}
    return {
        "seconds": seconds,
        "worker_bytes": {stage: found.get("peak_rss_bytes", 0) for stage, found in stats.items()},
        "driver_bytes": peak_bytes(),
    }


def memory_mb(runs: Sequence[Mapping[str, Any]], on_ray: bool) -> dict[str, list[float]]:
    """Peak by process, one number a run; in process there is only the driver. runs: as `run` returns."""
    found = {"the driver": [each["driver_bytes"] / 1e6 for each in runs]}
    if on_ray:
        found |= {f"the worker, {stage}": [each["worker_bytes"][stage] / 1e6 for each in runs] for stage in STREAMING}
    return found


def growing(memory: Mapping[str, Sequence[float]]) -> list[str]:
    """Whose memory is not flat. memory: as memory_mb returns."""
    return [
        f"the memory of {what} grows from {mb[0]:.0f} to {mb[-1]:.0f} MB"
        for what, mb in memory.items()
        if mb[-1] > MAX_MEMORY_RATIO * mb[0]
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, help="N, the smallest number of images")
    options.add_argument("--ray", action="store_true", help="one Ray actor for each stage that goes shard by shard")
    arguments = options.parse_args()
    smallest = arguments.images or (QUICK_IMAGES if arguments.quick else NUM_IMAGES)
    sizes = [smallest * factor for factor in (QUICK_FACTORS if arguments.quick else FACTORS)]
    in_child(run, 4, False)  # compiles, and caches what was compiled
    runs = []
    for num_images in sizes:
        runs.append(in_child(run, num_images, arguments.ray)[0])
        print(f"{num_images} images: {sum(runs[-1]['seconds'].values()):.1f} s", flush=True)
    rows, fits, failures = [], {}, []
    for stage in runs[0]["seconds"]:
        seconds = [each["seconds"][stage] for each in runs]
        power, (start_s, s_per_image) = exponent(sizes, seconds), line(sizes, seconds)
        fits[stage] = {"exponent": power, "start_s": start_s, "s_per_image": s_per_image, "seconds": seconds}
        rows.append([stage, *seconds, power, start_s, 1e3 * s_per_image])
        if power > MAX_EXPONENT and not arguments.quick:
            failures.append(f"{stage}: time grows as N ** {power:.2f}")
    memory = memory_mb(runs, arguments.ray)
    failures += growing(memory)
    clock = "wall s" if arguments.ray else "CPU s"
    shown = table(["stage", *(f"{clock}, N = {n}" for n in sizes), "exponent", "fixed s", "ms an image"], rows)
    shown += "\n\n" + table(["peak MB", *(f"N = {n}" for n in sizes)], [[what, *mb] for what, mb in memory.items()])
    numbers = {"sizes": sizes, "ray": arguments.ray, "fits": fits, "runs": runs}
    finish("growth_ray" if arguments.ray else "growth", numbers, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
