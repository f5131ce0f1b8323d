"""Features of images of many sizes: each the same as alone, in any order, with little that waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import jobs.extract_features as stage
from cluster.storage import Storage
from jobs.train_classifier import ClassifierSettings
from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.classifier import Classifier
from subcat_core.images import resize
from tests.subcat_core.test_region_features import plain_region_mean

SIZES = [(20 + 3 * index, 70 - 2 * index) for index in range(14)] + [(40, 40)] * 5 + [(24, 200), (300, 30)]
SETTINGS = stage.FeatureSettings(dtype="float32", batch_size=2, max_px=64, pass_px=3000)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, ClassifierSettings]:
    """The folder of a classifier with random weights, and its settings."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = ClassifierSettings(backbone=BackboneSettings(name="torchvision:resnet18", weights="none"))
    torch.manual_seed(0)
    model = Classifier(build_backbone(settings.backbone)[0], 2, 0)
    torch.save(model.state_dict(), folder / "model.pt")
    return Storage(str(folder)), settings


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Manifest rows of images of SIZES."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(11)
    made = []
    for index, size in enumerate(SIZES):
        path = folder / f"{index:02d}.png"
        Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(path)
        made.append({"image_id": path.stem, "uri": str(path), "labels": [index % 2]})
    return made


def make_worker(
    classifier: tuple[Storage, ClassifierSettings], settings: stage.FeatureSettings = SETTINGS
) -> stage.FeatureWorker:
    folder, classifier_settings = classifier
    worker = stage.FeatureWorker(
        classifier=folder, classifier_settings=classifier_settings, num_classes=2, settings=settings
    )
    worker.device = torch.device("cpu")  # where batches of another size differ by rounding alone
    worker.model.to("cpu")
    return worker


def features_of(worker: stage.FeatureWorker, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    output = worker({"manifest": pa.Table.from_pylist(rows)})
    assert (output.bad, output.num_rows) == ([], len(rows))
    assert output.table is not None
    return {row["image_id"]: np.asarray(row["feature"], np.float32) for row in output.table.to_pylist()}


def test_many_sizes_give_the_features_of_one_by_one_in_any_order(
    classifier: tuple[Storage, ClassifierSettings], rows: list[dict[str, Any]]
) -> None:
    worker = make_worker(classifier)
    features = features_of(worker, rows)
    assert sorted(features) == [row["image_id"] for row in rows]
    shuffled = features_of(worker, [rows[index] for index in np.random.default_rng(2).permutation(len(rows))])
    for row, (height, width) in zip(rows, SIZES, strict=True):
        factor = min(1.0, 64 / max(height, width))
        image = resize(np.array(Image.open(row["uri"])), round(height * factor), round(width * factor))
        with torch.inference_mode():
            plain = worker.model.extract(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
        np.testing.assert_allclose(features[row["image_id"]], plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(shuffled[row["image_id"]], plain, rtol=1e-5, atol=1e-5)


def test_few_images_wait_and_few_pixels_pass_together(
    classifier: tuple[Storage, ClassifierSettings], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(classifier)
    num_read = num_given = most = 0

    def counted(table: pa.Table) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        nonlocal num_read, most
        for row in table.to_pylist():
            num_read += 1
            most = max(most, num_read - num_given)
            yield row, np.asarray(Image.open(row["uri"]))

    monkeypatch.setattr(stage, "iter_images", counted)
    for batch in worker._batches(pa.Table.from_pylist(rows), []):
        assert len({image.shape for _, image in batch}) == 1
        assert len(batch) <= 2
        num_given += len(batch)
    assert num_given == len(rows)
    assert most == 4 * 2

    passed: list[int] = []
    extract = worker.model.extract

    def extract_counted(images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        return extract(images)

    monkeypatch.setattr(worker.model, "extract", extract_counted)
    assert worker._extract([np.zeros((40, 40, 3), np.uint8)] * 3).shape == (3, 512)
    assert passed == [1, 1, 1]  # 3000 px hold one image of 1600


def test_a_region_feature_for_each_class_is_that_of_the_image_alone(
    classifier: tuple[Storage, ClassifierSettings], rows: list[dict[str, Any]]
) -> None:
    tagged = [{**row, "labels": [[0], [0, 1], [1]][index % 3]} for index, row in enumerate(rows)]
    tagged[-1]["labels"] = None
    settings = SETTINGS.model_copy(update={"pool": "region", "region_threshold": 0.3})
    worker = make_worker(classifier, settings)
    output = worker({"manifest": pa.Table.from_pylist(tagged)})
    assert (output.bad, output.num_rows) == ([], len(rows))
    assert output.table is not None
    found = {(row["image_id"], *(row["labels"] or [])): row["feature"] for row in output.table.to_pylist()}
    assert sorted(found) == sorted((row["image_id"], *own) for row in tagged for own in pairs(row["labels"]))
    for row, (height, width) in zip(tagged, SIZES, strict=True):
        factor = min(1.0, 64 / max(height, width))
        image = resize(np.array(Image.open(row["uri"])), round(height * factor), round(width * factor))
        with torch.inference_mode():
            cells = worker.model.backbone(torch.from_numpy(image).permute(2, 0, 1)[None])[0].double().numpy()
        for own in pairs(row["labels"]):
            weights = worker.model.parent_head.weight.detach().double().numpy()[own].sum(axis=0)
            cam = np.maximum(np.tensordot(weights, cells, 1), 0) if own else np.zeros(cells.shape[1:])
            expected = plain_region_mean(cells, cam, 0.3)
            np.testing.assert_allclose(found[row["image_id"], *own], expected, rtol=1e-4, atol=1e-4)


def pairs(labels: list[int] | None) -> list[list[int]]:
    return [[class_index] for class_index in labels] if labels else [[]]


def test_settings_without_effect_are_in_no_fingerprint() -> None:
    assert stage._without_effect(SETTINGS) == {"batch_size", "pass_px", "pool", "region_threshold"}
    assert stage._without_effect(SETTINGS.model_copy(update={"pool": "region"})) == {"batch_size", "pass_px"}


@pytest.mark.parametrize(
    ("base_px", "max_px", "size", "expected"),
    [
        (None, 1024, (500, 333), (500, 333)),
        (None, 1024, (1500, 3000), (512, 1024)),
        (32, 1024, (500, 333), (48, 32)),
        (32, 40, (500, 333), (40, 27)),
        (32, None, (10, 2000), (1, 256)),
        (None, None, (10, 2000), (10, 2000)),
    ],
)
def test_sizes(
    classifier: tuple[Storage, ClassifierSettings],
    base_px: int | None,
    max_px: int | None,
    size: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    worker = make_worker(classifier, stage.FeatureSettings(base_px=base_px, max_px=max_px))
    assert worker._resized(np.zeros((*size, 3), np.uint8)).shape == (*expected, 3)
