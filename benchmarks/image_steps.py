"""Steps of one image against ports of the published code: `python -m benchmarks.image_steps [--turns 5] [--quick]`.

`views`: the 8 normalised views of a photo (4 scales, mirrored), against Pillow's bicubic and NumPy as in PSA's loader.
`maps`: from the network's low-resolution maps to one normalised map of each tagged class in full size, against
infer_cls.py of SC-CAM, which brings all 20 + 200 channels of each view to full size, multiplies by the tags and adds;
the building of views is in our time and not in the peer's. `miou`: one confusion matrix, against the usual bincount
of int64 codes. Algorithms are ported, not code. CPU time of one thread; a photo of scikit-learn at 375 x 500 px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.crf import photos
from benchmarks.harness import finish, interleave, parser, table
from subcat_core.cam import CamSettings, compute_cams
from subcat_core.metrics import ConfusionMatrix
from subcat_core.views import resize_batch, view_sizes

OURS, PEER = "subcat", "port"
SCALES = (1.0, 0.5, 1.5, 2.0)
NUM_CLASSES, NUM_SUBCATEGORIES, TAGS = 20, 200, (7, 14)
STRIDE_PX = 8
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
MAX_TIME_RATIO = {"views": 1 / 4, "maps": 1 / 50, "miou": 1 / 2.5}
MAX_DIFFERENCE = {"views": 1.01 / 255 / 0.224, "maps": 1e-5, "miou": 0.0}  # of views: one grey level
TURNS = 5

Sides = dict[str, Callable[[], Any]]


def views(image: np.ndarray) -> Sides:
    """Each side: a list of (2, 3, h, w) float32, the view and its mirror image."""
    sizes = view_sizes(*image.shape[:2], SCALES, None, None)
    mean, std = torch.from_numpy(MEAN * 255).view(3, 1, 1), torch.from_numpy(STD * 255).view(3, 1, 1)

    def ours() -> list[torch.Tensor]:
        batch = torch.from_numpy(image).permute(2, 0, 1)[None]
        made = []
        for height, width in sizes:
            view = resize_batch(batch, height, width).float().sub_(mean).div_(std)
            made.append(torch.cat([view, view.flip(3)]))
        return made

    def port() -> list[np.ndarray]:
        made = []
        for height, width in sizes:
            view = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            view = ((view / 255.0 - MEAN) / STD).transpose(2, 0, 1)
            made.append(np.stack([view, np.flip(view, -1)]).astype(np.float32))
        return made

    return {OURS: ours, PEER: port}


class Precomputed:
    """Stands for the classifier: gives the same maps at each call, by the size of the view."""

    training = False

    def __init__(self, maps: Mapping[tuple[int, int], torch.Tensor]) -> None:
        self.maps = maps

    def parent_maps(self, views: torch.Tensor, class_indices: list[int], *, relu: bool) -> torch.Tensor:
        """(2, n, h, w): of the view and its mirror image."""
        return self.maps[views.shape[2], views.shape[3]][:, class_indices]


def maps(image: np.ndarray) -> Sides:
    """Each side: (2, H, W) float32, the normalised maps of the two tags."""
    rng = np.random.default_rng(0)
    sizes = view_sizes(*image.shape[:2], SCALES, None, None)
    channels = NUM_CLASSES + NUM_SUBCATEGORIES
    low = {
        (h, w): torch.from_numpy(rng.random((2, channels, -(-h // STRIDE_PX), -(-w // STRIDE_PX)), np.float32))
        for h, w in sizes
    }
    classifier: Any = Precomputed(low)
    settings = CamSettings(scales=SCALES, grid_stride_px=1, max_px=None)
    label = np.zeros((channels, 1, 1), np.float32)
    label[list(TAGS)] = 1

    def ours() -> np.ndarray:
        return compute_cams(classifier, [image], [TAGS], settings)[0].maps

    def port() -> np.ndarray:
        kept = []
        for both in low.values():
            for mirrored in (0, 1):
                full = F.interpolate(both[mirrored][None], image.shape[:2], mode="bilinear", align_corners=False)
                view = full[0].numpy() * label
                kept.append(np.flip(view, -1) if mirrored else view)
        total = np.sum(kept, axis=0)[list(TAGS)]
        return total / (total.max(axis=(1, 2), keepdims=True) + 1e-5)

    return {OURS: ours, PEER: port}


def miou(image: np.ndarray) -> Sides:
    """Each side: (21, 21) int64."""
    rng = np.random.default_rng(0)
    truth, prediction = (rng.integers(0, NUM_CLASSES + 1, image.shape[:2]).astype(np.uint8) for _ in range(2))
    truth[:10] = 255

    def ours() -> np.ndarray:
        confusion = ConfusionMatrix(NUM_CLASSES)
        confusion.update(prediction, truth)
        return confusion.counts

    def port() -> np.ndarray:
        size = NUM_CLASSES + 1
        valid = (truth >= 0) & (truth < size)
        codes = size * truth[valid].astype(int) + prediction[valid]
        return np.bincount(codes, minlength=size**2).reshape(size, size)

    return {OURS: ours, PEER: port}


def difference(results: Mapping[str, Any]) -> float:
    """The largest of all values of both sides."""
    ours, port = (value if isinstance(value, list) else [value] for value in (results[OURS], results[PEER]))
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, port, strict=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=TURNS)
    arguments = options.parse_args()
    [image] = photos(None, 1)[:1]
    turns = arguments.turns
    if arguments.quick:
        image, turns = np.ascontiguousarray(image[:96, :128]), 2
    rows, records, failures = [], {}, []
    for name, make in {"views": views, "maps": maps, "miou": miou}.items():
        differences: list[float] = []
        both = interleave(make(image), turns, check=lambda results, kept=differences: kept.append(difference(results)))
        ratio, limit = both.ratio(OURS, PEER), MAX_TIME_RATIO[name]
        records[name] = {"ratio": ratio, "max_difference": max(differences), **both.to_json()}
        rows.append([name, 1e3 * both.median(OURS), 1e3 * both.median(PEER), ratio, limit, f"{max(differences):.1e}"])
        if max(differences) > MAX_DIFFERENCE[name]:
            failures.append(f"{name}: differs by {max(differences):.1e}, more than {MAX_DIFFERENCE[name]:.1e}")
        if ratio > limit and not arguments.quick:
            failures.append(f"{name}: ratio {ratio:.3f} above {limit:.3f}")
    shown = table(["step", "ms, ours", "ms, port", "ratio", "at most", "max difference"], rows)
    finish("image_steps", records, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
