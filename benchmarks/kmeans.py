"""k-means per class against its peers: `python -m benchmarks.kmeans [--dimension D] [--quick] [--json FILE]`.

The shape is that of VOC 2012 train_aug: 10,582 images and 16,458 pairs of image and class; the tags are VOC's own where
--labels names a table of them (image_id and a column of 0/1 a class), and otherwise drawn to its number of images a
class. Features are synthetic with a power-law spectrum, as CNN features have: ratios on real ones may differ. Ours
counts from features in memory, the building of its blocks included; the peers fit class by class on row copies, as the
authors' code does. The peak memory of a side is that of a process of its own, which holds the features too. Kept where
ours is at least as many times faster as MIN_RATIOS and MIN_PASS_RATIOS say, its inertia is not above that of
scikit-learn with 10 starts, and centres of clusters of 20 million rows are right to 1e-5; not judged with --quick.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.harness import Comparison, finish, in_child, interleave, one_thread, parser, table
from benchmarks.kmeans_sides import (
    BEST_PEER,
    NUM_CLUSTERS,
    NUM_IMAGES,
    PASS_STEPS,
    Sides,
    draw_labels,
    many_rows,
    pass_sides,
    power_law_features,
    read_labels,
)

QUICK_DIMENSION = 256
MIN_RATIOS = (
    ("stage: the authors'", "stage: ours", 15.0),
    ("scikit-learn, 1 start", "ours", 2.5),
    ("faiss, 10 starts", "ours", 6.0),
)
MIN_PASS_RATIOS = {"faiss": 1.5, "scikit-learn": 1.2}
TRUE_CENTRES, MAX_CENTRE_ERROR = (0.5, 10.5), 1e-5


def run_side(name: str, features: Path, labels: Sequence[Sequence[int]]) -> float:
    """One side from a file of features, in a process of its own."""
    faiss.omp_set_num_threads(1)
    return Sides(np.load(features), labels).named(quick=False)[name]()


def peaks(names: Sequence[str], features: np.ndarray, labels: Sequence[Sequence[int]]) -> dict[str, float]:
    """MB by side, the features included."""
    with tempfile.TemporaryDirectory(prefix="subcat-kmeans-") as folder:
        path = Path(folder) / "features.npy"
        np.save(path, features)
        return {name: in_child(run_side, name, path, labels)[2] / 1e6 for name in names}


def pass_times(passes: Comparison, steps_made: Mapping[str, float], unit: str) -> dict[str, float]:
    """Seconds of one pass by side: from the second on, as many more passes take; and our first one, of all rows."""
    seconds = {}
    for name in ("ours", *MIN_PASS_RATIOS):
        few, many = f"{name}, 1", f"{name}, {1 + PASS_STEPS}"
        more = passes.median(many, unit) - passes.median(few, unit)
        seconds[name] = more / (steps_made[many] - steps_made[few])
    return {**seconds, "ours, the first pass": passes.median("ours, 1", unit)}


def not_kept(
    whole: Comparison,
    inertia: Mapping[str, float],
    pass_seconds: Mapping[str, float],
    centres: Mapping[str, Sequence[float]],
) -> list[str]:
    """What of the limits is not kept; centres: as many_rows, or nothing."""
    ratios = [(f"{peer} / {side}", whole.ratio(peer, side), least) for peer, side, least in MIN_RATIOS]
    ratios += [
        (f"a pass of {peer} / ours", pass_seconds[peer] / pass_seconds["ours"], least)
        for peer, least in MIN_PASS_RATIOS.items()
    ]
    failures = [f"{what}: {ratio:.2f} times, at least {least:g}" for what, ratio, least in ratios if ratio < least]
    if inertia["ours"] > inertia[BEST_PEER]:
        failures.append(f"inertia {inertia['ours']:.6g}, above {inertia[BEST_PEER]:.6g} of {BEST_PEER}")
    if centres and not np.allclose(centres["ours"], TRUE_CENTRES, rtol=0, atol=MAX_CENTRE_ERROR):
        failures.append(f"centres {centres['ours']}, not {TRUE_CENTRES}")
    return failures


def shown(
    whole: Comparison,
    inertia: Mapping[str, float],
    peak_mb: Mapping[str, float],
    pass_cpu_s: Mapping[str, float],
    pass_wall_s: Mapping[str, float],
) -> str:
    """The tables."""
    rows: list[list[Any]] = []
    for name in whole.samples:
        ours = "stage: ours" if name.startswith("stage") else "ours"
        seconds = (whole.median(name), whole.median(name, "wall_s"), whole.ratio(name, ours))
        rows.append([name, *seconds, f"{inertia[name] / inertia['ours']:.4f}", peak_mb[name]])
    text = table(["side", "CPU s", "wall s", "time / ours", "inertia / ours", "peak MB"], rows)
    rows = [[name, 1e3 * s, 1e3 * pass_wall_s[name], s / pass_cpu_s["ours"]] for name, s in pass_cpu_s.items()]
    return f"{text}\n\n{table(['one pass over all rows', 'CPU ms', 'wall ms', 'time / ours'], rows)}"


def options() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--dimension", type=int, default=4096)
    found.add_argument("--turns", type=int, default=3)
    found.add_argument("--labels", type=Path, nargs=2, metavar=("LABELS.CSV", "LIST.TXT"))
    found.add_argument("--features", type=Path, help="features (10582, D) float32 as .npy, instead of synthetic ones")
    found.add_argument("--rows", type=int, default=40_000_000, help="rows of the two large clusters; 0 leaves them out")
    arguments = found.parse_args()
    if arguments.quick:  # few dimensions, one start of scikit-learn, and the passes
        arguments.dimension, arguments.rows = min(arguments.dimension, QUICK_DIMENSION), 0
    return arguments


def main() -> None:
    arguments = options()
    rng = np.random.default_rng(0)
    labels = read_labels(*arguments.labels) if arguments.labels else draw_labels(rng)
    faiss.omp_set_num_threads(1)
    with one_thread():
        features = (
            np.load(arguments.features)
            if arguments.features
            else power_law_features(NUM_IMAGES, arguments.dimension, rng)
        )
        Sides(features[:320], labels[:320]).our_stage()  # compiles
    inertia: dict[str, float] = {}
    sides = Sides(features, labels).named(arguments.quick)
    whole = interleave(sides, arguments.turns, warm_up=0, check=inertia.update)
    steps_made: dict[str, float] = {}
    turns = max(5, arguments.turns)
    passes = interleave(pass_sides(features, NUM_CLUSTERS), turns, warm_up=0, check=steps_made.update)
    pass_cpu_s, pass_wall_s = (pass_times(passes, steps_made, unit) for unit in ("cpu_s", "wall_s"))
    peak_mb = peaks(list(sides), features, labels)
    centres = many_rows(arguments.rows) if arguments.rows else {}
    text = shown(whole, inertia, peak_mb, pass_cpu_s, pass_wall_s)
    for name, found in centres.items():
        text += f"\ncentres {TRUE_CENTRES} of {arguments.rows:,} rows, {name}: {found}"
    numbers = {
        "whole": whole.to_json(),
        "inertia": inertia,
        "peak_mb": peak_mb,
        "passes": passes.to_json(),
        "pass_cpu_s": pass_cpu_s,
        "pass_wall_s": pass_wall_s,
        "centres": centres,
    }
    failures = [] if arguments.quick else not_kept(whole, inertia, pass_cpu_s, centres)
    finish("kmeans", numbers, text, failures, arguments.json)


if __name__ == "__main__":
    main()
