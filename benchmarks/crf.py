"""Dense CRF against pydensecrf2, in CPU time: `python -m benchmarks.crf [--photos FOLDER] [--json FILE]`.

Both sides run in one thread on the same photo and the same maps, taking turns A/B/A/B; a row is the median over all
turns. Agreement is the worst over the photos. Our spatial lattice is warm from the second photo of a size on, as in a
run over a data set; pydensecrf2 has no such cache. Without --photos: the two photos that come with scikit-learn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from threadpoolctl import threadpool_limits

from subcat_core.crf import CrfSettings, dense_crf

HEIGHT_PX, WIDTH_PX = 375, 500
NUM_LABELS = (2, 3, 5, 21)
MAX_TIME_RATIO = {2: 0.8, 3: 0.8, 5: 0.8, 21: 1.1}
MIN_AGREEMENT, MAX_DIFFERENCE = 0.9999, 1e-3


def photos(folder: Path | None, limit: int) -> list[np.ndarray]:
    """(H, W, 3) uint8: real photos at their own size, or scikit-learn's two at the size of VOC."""
    if folder is not None:
        return [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))[:limit]]
    size = (WIDTH_PX, HEIGHT_PX)
    return [
        np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in load_sample_images().images
    ]


def maps(num_labels: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(L, H, W) float32 in 0..1: smooth like upsampled CAMs, not summing to 1."""
    grids = rng.random((num_labels, height // 16 + 2, width // 16 + 2)).astype(np.float32)
    return np.stack(
        [np.array(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)) for grid in grids]
    )


def peer_crf(peer: ModuleType, probability: np.ndarray, image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """The same marginals by pydensecrf2."""
    num_labels, height, width = probability.shape
    model = peer.DenseCRF2D(width, height, num_labels)
    model.setUnaryEnergy(-np.log(np.clip(probability, 1e-5, 1)).reshape(num_labels, -1))
    model.addPairwiseGaussian(sxy=settings.spatial_sigma_px, compat=settings.spatial_weight)
    model.addPairwiseBilateral(
        sxy=settings.bilateral_sigma_px,
        srgb=settings.bilateral_sigma_rgb,
        rgbim=image,
        compat=settings.bilateral_weight,
    )
    return np.array(model.inference(settings.iterations)).reshape(probability.shape)


def timed(function: Callable[..., np.ndarray], *inputs: Any) -> tuple[float, np.ndarray]:
    """(CPU seconds, result)."""
    start = time.process_time()
    result = function(*inputs)
    return time.process_time() - start, result


def compare(peer: ModuleType | None, num_labels: int, images: list[np.ndarray], turns: int) -> dict[str, Any]:
    """One row: median CPU seconds of both sides, their ratio, and how far the results are apart."""
    settings, rng = CrfSettings(), np.random.default_rng(num_labels)
    ours, theirs, agreement, difference = [], [], [1.0], [0.0]
    for image in images:
        height, width = image.shape[:2]
        probability = maps(num_labels, height, width, rng)
        for _ in range(turns):
            seconds, found = timed(dense_crf, probability, image, settings)
            ours.append(seconds)
            if peer is not None:
                seconds, expected = timed(peer_crf, peer, probability, image, settings)
                theirs.append(seconds)
                agreement.append(float((found.argmax(axis=0) == expected.argmax(axis=0)).mean()))
                difference.append(float(np.abs(found - expected).max()))
    row: dict[str, Any] = {"num_labels": num_labels, "subcat_s": statistics.median(ours)}
    if peer is not None:
        row["pydensecrf2_s"] = statistics.median(theirs)
        row["ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        row["agreement"], row["max_difference"] = min(agreement), max(difference)
        exact = row["agreement"] >= MIN_AGREEMENT and row["max_difference"] <= MAX_DIFFERENCE
        row["passed"] = bool(exact and row["ratio"] <= MAX_TIME_RATIO[num_labels])
    return row


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    line = f"{row['num_labels']:>6} {row['subcat_s']:>9.3f}"
    if "ratio" not in row:
        return line
    limit = MAX_TIME_RATIO[row["num_labels"]]
    return (
        f"{line} {row['pydensecrf2_s']:>13.3f} {row['ratio']:>6.2f} {limit:>7.2f} {row['agreement']:>10.6f} "
        f"{row['max_difference']:>9.1e}  {'yes' if row['passed'] else 'NO'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="folder of .jpg photos")
    parser.add_argument("--max-photos", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5, help="A/B pairs a photo")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    images = photos(arguments.photos, arguments.max_photos)
    if not images:
        raise SystemExit(f"no .jpg in {arguments.photos}")
    peer = None
    try:
        peer = importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        print(
            f"no ratio: {error}. pydensecrf2 builds from source with a C++ compiler on Python 3.11 or 3.12: "
            "pip install '.[peers]'"
        )
    height, width = np.mean([image.shape[:2] for image in images], axis=0)
    print(
        f"dense CRF: {len(images)} photos, {height:.0f} x {width:.0f} px on average, 10 steps, CPU seconds, one thread"
    )
    print("labels  subcat_s pydensecrf2_s  ratio at_most  agreement max_diff passed" if peer else "labels  subcat_s")
    rows = []
    with threadpool_limits(1):
        compare(peer, 3, images[:1], 1)
        for num_labels in NUM_LABELS:
            rows.append(compare(peer, num_labels, images, arguments.turns))
            print(show(rows[-1]), flush=True)
    text = json.dumps({"benchmark": "crf", "num_photos": len(images), "rows": rows})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    if not all(row.get("passed", True) for row in rows):
        raise SystemExit("a ratio or an agreement is outside its limit")


if __name__ == "__main__":
    main()
