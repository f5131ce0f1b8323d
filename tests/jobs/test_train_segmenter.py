"""What the segmenter's training adds to the worker loop: crops of image and mask, and losses at several scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.make_pseudo_masks import PseudoMaskStageSettings
from jobs.train_segmenter import SegmenterStageSettings, SegmenterTrainee, fingerprinted, trained_px
from jobs.training_masks import encode_confidence
from subcat_core.backbones import BackboneSettings
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.gated_crf import GatedCrfSettings, gated_crf_loss
from subcat_core.images import AugmentSettings
from subcat_core.segmenter import SegmenterSettings, multi_scale_loss, segmentation_loss

PUBLISHED_CROP = AugmentSettings(scales=(0.5, 1.0), crop_px=64, pad="end", jitter=(0.0, 0.0, 0.0, 0.0))


def trainee(name: str = "torchvision:resnet18", **model: object) -> SegmenterTrainee:
    backbone = BackboneSettings(name=name, weights="none", output_stride=8)
    settings = SegmenterSettings.model_validate({"backbone": backbone, **model})
    return SegmenterTrainee(SegmenterStageSettings(model=settings, augment=PUBLISHED_CROP), ClassTable(("a", "b")))


def batch(rng: np.random.Generator, weight: tuple[float, ...] = (1.0, 1.0)) -> dict[str, torch.Tensor]:
    return {
        "image": torch.from_numpy(rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)),
        "mask": torch.from_numpy(rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (2, 64, 64))),
        "weight": torch.tensor(weight),
    }


def test_the_published_loss_sums_four_and_reaches_every_parameter(rng: np.random.Generator) -> None:
    of_three = trainee(train_scales=(1.0, 0.5, 0.75), loss_at="logits")
    torch.manual_seed(0)
    model = of_three.build_model().eval()
    inputs = batch(rng)
    loss, scalars = of_three.loss(model, inputs)
    expected = multi_scale_loss(model(inputs["image"], (1.0, 0.5, 0.75)), inputs["mask"], loss_at="logits")
    torch.testing.assert_close(loss, expected)
    assert scalars["loss"] == loss
    single, _ = trainee().loss(model, inputs)
    assert loss > 2 * single
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("loss_at", ["mask", "logits"])
def test_bad_images_count_nothing_at_any_scale(rng: np.random.Generator, loss_at: str) -> None:
    of_two = trainee(train_scales=(1.0, 0.5), loss_at=loss_at)
    torch.manual_seed(0)
    model = of_two.build_model().eval()
    inputs = batch(rng, (1.0, 0.0))
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    torch.testing.assert_close(of_two.loss(model, inputs)[0], of_two.loss(model, alone)[0])
    assert of_two.loss(model, batch(rng, (0.0, 0.0)))[0].item() == 0


def test_soft_bootstrap_is_in_the_loss_that_training_takes(rng: np.random.Generator) -> None:
    plain, soft = (
        dataclasses.replace(made, settings=made.settings.model_copy(update={"loss": loss}))
        for made, loss in ((trainee(), "cross_entropy"), (trainee(), "soft_bootstrap"))
    )
    torch.manual_seed(0)
    model = plain.build_model().eval()
    inputs = batch(rng)
    logits = model(inputs["image"])
    torch.testing.assert_close(plain.loss(model, inputs)[0], segmentation_loss(logits, inputs["mask"]))
    expected = segmentation_loss(logits, inputs["mask"], bootstrap_beta=0.8)
    torch.testing.assert_close(soft.loss(model, inputs)[0], expected)


def test_options_that_are_off_are_not_in_the_fingerprint() -> None:
    before = {"model", "augment", "optimiser"}  # of runs that were made before there were options
    assert set(fingerprinted(SegmenterStageSettings())) == before
    assert set(fingerprinted(SegmenterStageSettings(loss="soft_bootstrap"))) == {*before, "loss", "bootstrap_beta"}
    assert set(fingerprinted(SegmenterStageSettings(loss="confidence"))) == {*before, "loss"}
    assert set(PseudoMaskStageSettings().fingerprinted()) == {"mask"}
    assert set(PseudoMaskStageSettings(write_confidence=True).fingerprinted()) == {"mask", "write_confidence"}
    assert set(fingerprinted(SegmenterStageSettings(boundary_weight=0.1))) == {*before, "boundary_weight", "boundary"}


def test_the_boundary_loss_is_added_and_sees_neither_padding_nor_bad_images(rng: np.random.Generator) -> None:
    plain = trainee()
    weighted = dataclasses.replace(plain, settings=plain.settings.model_copy(update={"boundary_weight": 0.5}))
    torch.manual_seed(0)
    model = plain.build_model().eval()
    inputs = batch(rng, (1.0, 0.0))
    inputs["mask"][0, :, 40:] = IGNORE  # unsure up to column 48, padding from there on
    inputs["image"][0, :, :, 48:] = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]
    gate = torch.zeros(2, 64, 64)
    gate[0, :, :48] = 1.0
    logits = model(inputs["image"])
    expected = gated_crf_loss(logits, inputs["image"], gate, GatedCrfSettings())
    loss, scalars = weighted.loss(model, inputs)
    torch.testing.assert_close(scalars["boundary_loss"], expected.detach())
    torch.testing.assert_close(scalars["mask_loss"], plain.loss(model, inputs)[0].detach())
    torch.testing.assert_close(loss, scalars["mask_loss"] + 0.5 * scalars["boundary_loss"])
    assert expected > 0


def test_confidence_is_cropped_with_the_mask_and_counts_in_the_loss(tmp_path: Path, rng: np.random.Generator) -> None:
    plain = trainee()
    by_confidence = dataclasses.replace(plain, settings=plain.settings.model_copy(update={"loss": "confidence"}))
    mask = rng.integers(0, 3, (40, 30), dtype=np.uint8)
    Image.fromarray(np.full((40, 30, 3), 7, np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "sure.png").write_bytes(encode_confidence(mask.astype(np.float32) / 2))
    row = {"uri": "image", "mask_uri": "mask", "confidence_uri": "sure"}
    sample = by_confidence.make_sample({key: str(tmp_path / f"{name}.png") for key, name in row.items()}, rng)
    inside = sample["mask"] != IGNORE
    np.testing.assert_array_equal(sample["confidence"][inside], np.array([0, 128, 255])[sample["mask"][inside]])
    empty = by_confidence.empty_sample()
    assert {key: (array.shape, array.dtype) for key, array in empty.items()} == {
        key: (array.shape, array.dtype) for key, array in sample.items()
    }
    assert set(plain.empty_sample()) == {"image", "mask"}
    torch.manual_seed(0)
    model = plain.build_model().eval()
    confidence = torch.from_numpy(rng.integers(0, 256, (2, 64, 64), dtype=np.uint8))
    inputs = batch(rng) | {"confidence": confidence}
    expected = segmentation_loss(model(inputs["image"]), inputs["mask"], confidence=confidence)
    torch.testing.assert_close(by_confidence.loss(model, inputs)[0], expected)


def test_a_sample_is_padded_with_the_networks_mean(tmp_path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(np.full((40, 30, 3), 7, np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.ones((40, 30), np.uint8)).save(tmp_path / "mask.png")
    row = {"uri": str(tmp_path / "image.png"), "mask_uri": str(tmp_path / "mask.png")}
    sample = trainee("subcat:resnet101-caffe").make_sample(row, rng)
    outside = sample["mask"] == IGNORE
    assert (~outside).sum() in (40 * 30, 20 * 15)
    assert (sample["image"][:, ~outside] == 7).all()
    assert (sample["image"][:, outside].T == (123, 117, 104)).all()


def test_factors_of_an_images_own_size_leave_prediction_at_it() -> None:
    assert trained_px(trainee().settings) is None
    assert trained_px(SegmenterStageSettings()) == 336
