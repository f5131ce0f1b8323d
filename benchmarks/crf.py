"""Dense CRF against pydensecrf2, in CPU time: `python -m benchmarks.crf [--photos FOLDER] [--quick] [--json FILE]`.

Both sides run in one thread on the same photo and the same maps, taking turns A/B/A/B; a row is the median over all
turns. Agreement is the worst over the photos. Our spatial lattice is warm from the second photo of a size on, as in a
run over a data set; pydensecrf2 has no such cache. Without --photos: the two photos that come with scikit-learn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.harness import Comparison, Sample, finish, interleave, parser, table
from subcat_core.crf import CrfSettings, dense_crf

OURS, PEER = "subcat", "pydensecrf2"
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


def compare(peer: ModuleType | None, num_labels: int, images: list[np.ndarray], turns: int) -> dict[str, Any]:
    """One row: median CPU seconds of both sides, their ratio, and how far the results are apart."""
    settings, rng = CrfSettings(), np.random.default_rng(num_labels)
    samples: dict[str, list[Sample]] = {}
    agreement, difference = [1.0], [0.0]

    def check(results: Mapping[str, np.ndarray]) -> None:
        if PEER in results:
            found, expected = results[OURS], results[PEER]
            agreement.append(float((found.argmax(axis=0) == expected.argmax(axis=0)).mean()))
            difference.append(float(np.abs(found - expected).max()))

    for image in images:
        probability = maps(num_labels, *image.shape[:2], rng)
        sides: dict[str, Callable[[], np.ndarray]] = {OURS: partial(dense_crf, probability, image, settings)}
        if peer is not None:
            sides[PEER] = partial(peer_crf, peer, probability, image, settings)
        for name, more in interleave(sides, turns, warm_up=0, check=check).samples.items():
            samples.setdefault(name, []).extend(more)
    both = Comparison(samples)
    row: dict[str, Any] = {"num_labels": num_labels, **both.to_json()}
    if peer is not None:
        row |= {"ratio": both.ratio(OURS, PEER), "agreement": min(agreement), "max_difference": max(difference)}
    return row


def failures(rows: list[dict[str, Any]], *, quick: bool) -> list[str]:
    """Which limits are not kept; quick: those of time are not looked at."""
    texts = []
    for row in (row for row in rows if "ratio" in row):
        if row["ratio"] > MAX_TIME_RATIO[row["num_labels"]] and not quick:
            texts.append(f"L = {row['num_labels']}: ratio {row['ratio']:.2f} above {MAX_TIME_RATIO[row['num_labels']]}")
        if row["agreement"] < MIN_AGREEMENT or row["max_difference"] > MAX_DIFFERENCE:
            texts.append(f"L = {row['num_labels']}: agreement {row['agreement']}, difference {row['max_difference']}")
    return texts


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    if "ratio" not in rows[0]:
        return table(["labels", "CPU s, ours"], [[row["num_labels"], row[OURS]["cpu_s"]] for row in rows])
    return table(
        ["labels", "CPU s, ours", f"CPU s, {PEER}", "ratio", "at most", "agreement", "max difference"],
        [
            [
                *(row["num_labels"], row[OURS]["cpu_s"], row[PEER]["cpu_s"], row["ratio"]),
                *(MAX_TIME_RATIO[row["num_labels"]], f"{row['agreement']:.6f}", f"{row['max_difference']:.1e}"),
            ]
            for row in rows
        ],
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--photos", type=Path, help="folder of .jpg photos")
    options.add_argument("--max-photos", type=int, default=20)
    options.add_argument("--turns", type=int, default=5, help="A/B pairs a photo")
    arguments = options.parse_args()
    images = photos(arguments.photos, arguments.max_photos)
    if not images:
        raise SystemExit(f"no .jpg in {arguments.photos}")
    if arguments.quick:
        images = [np.ascontiguousarray(image[:120, :160]) for image in images[:1]]
    peer = None
    try:
        peer = importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        print(
            f"no ratio: {error}. pydensecrf2 builds from source with a C++ compiler on Python 3.11 or 3.12: "
            "pip install '.[peers]'"
        )
    compare(peer, 3, images[:1], 1)  # compiles
    rows = [compare(peer, num_labels, images, 2 if arguments.quick else arguments.turns) for num_labels in NUM_LABELS]
    title = f"dense CRF: {len(images)} photos, 10 steps, one thread; medians"
    missed = failures(rows, quick=arguments.quick)
    finish("crf", {"num_photos": len(images), "rows": rows}, f"{title}\n{show(rows)}", missed, arguments.json)


if __name__ == "__main__":
    main()
