"""A folder in GlaS layout with a few small images, and stages on it that run in this process, without training."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.artifacts import Artifact
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker, TrackingSettings
from jobs import prepare
from jobs.config import parse_experiment
from jobs.context import StageContext
from jobs.manifest import Manifest, open_manifest
from jobs.train_segmenter import trained_px
from subcat_core.backbones import build_backbone
from subcat_core.classifier import Classifier
from subcat_core.segmenter import build_segmenter

SIZES = {"train_1": (40, 56), "train_2": (40, 40), "train_3": (20, 50), "testB_1": (40, 56), "testB_2": (33, 41)}
TILES = {"tile_px": 24, "stride_px": 12, "tags_from_masks_frac": 0.05}
BACKBONE = {"name": "timm:mobilenetv2_050", "weights": "none", "output_stride": 16}


def draw_glands(folder: Path) -> Path:
    """Pink discs on pale ground; their masks hold 0 and 255."""
    rng = np.random.default_rng(7)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for image_id, (height, width) in SIZES.items():
        rows, columns = np.mgrid[:height, :width]
        y, x = rng.integers(8, height - 8), rng.integers(8, width - 8)
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= 64
        pixels = rng.integers(200, 250, (height, width, 3)).astype(np.uint8)
        pixels[inside] = (200, 80, 160)
        Image.fromarray(pixels).save(folder / f"images/{image_id}.webp", lossless=True)
        Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(folder / f"masks/{image_id}.png")
    return folder


def glas_values(data: Path, output: str, tiles: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Plain values of an experiment on such a folder, in process."""
    augment = {"resize_min_px": 32, "resize_max_px": 32, "crop_px": 32}
    optimiser = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01}
    compute = {"num_workers": 0, "num_decode_workers": 0}
    training = {"augment": augment, "optimiser": optimiser, "compute": compute}
    source = {"kind": "glas", "path": str(data), "splits": {"train": ["train"], "val": ["testB"]}}
    values = {
        "name": "glands",
        "output": output,
        "rounds": 1,
        "prepare": {"source": source, "rows_per_shard": 2, "tiles": dict(TILES if tiles is None else tiles)},
        "classifier": {"backbone": BACKBONE, **training},
        "kmeans": {"num_clusters": 2, "num_restarts": 2},
        "cams": {"cam": {"scales": [1.0, 1.5], "flip": False, "normalise": "softmax"}},
        "pseudo_masks": {"mask": {"crf": None}, "write_confidence": True},
        "segmenter": {"model": {"backbone": BACKBONE}, **training},
        "stream": {"num_actors": 0},
        "tracking": {"enabled": False},
    }
    return {**values, **changes}


def context_of(values: dict[str, Any]) -> StageContext:
    """What stages get."""
    experiment = parse_experiment(values)
    storage = Storage(experiment.output)
    tracker = Tracker(TrackingSettings(enabled=False), storage, "test")
    return StageContext(experiment, storage, Progress(io.StringIO()), tracker)


def prepared(context: StageContext) -> Manifest:
    """The manifest of whole images."""
    prepare.run(context)
    return open_manifest(context.storage)


def random_classifier(context: StageContext) -> Artifact:
    """A classifier that learned nothing, as `train_classifier` leaves one."""
    torch.manual_seed(6)  # its maps of both classes are the larger ones somewhere
    backbone, _ = build_backbone(context.experiment.classifier.backbone)
    model = Classifier(backbone, 2, 0, dropout=0.5)
    return stored_model(context, "rounds/00/classifier", model, {})


def random_segmenter(context: StageContext) -> Artifact:
    """A segmenter that learned nothing, as `train_segmenter` leaves one."""
    torch.manual_seed(2)
    settings = context.experiment.segmenter
    model, _ = build_segmenter(settings.model, 2)
    described = {
        "model": settings.model.model_dump(mode="json"),
        "classes": ["not gland", "gland"],
        "has_background": False,
        "base_px": trained_px(settings),
        "num_train_images": 3,
    }
    return stored_model(context, "segmenter", model, {"segmenter.json": described})


def stored_model(context: StageContext, name: str, model: torch.nn.Module, files: dict[str, Any]) -> Artifact:
    """A folder as a training leaves one."""
    artifact = Artifact(context.storage, name, {"stage": "test"})
    artifact.begin()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    artifact.folder.write_bytes("model.pt", buffer.getvalue())
    for file, value in files.items():
        artifact.folder.write_json(file, value)
    artifact.commit({})
    return artifact
