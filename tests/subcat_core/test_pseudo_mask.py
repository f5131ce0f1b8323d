"""Pseudo masks: background score, only present classes, IGNORE where unsure."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from subcat_core.cam import cam_to_labels, upsample_cam
from subcat_core.classes import IGNORE
from subcat_core.crf import CrfSettings
from subcat_core.pseudo_mask import (
    PseudoMaskSettings,
    class_probability,
    confidence_levels,
    labels_of_scores,
    make_pseudo_mask,
    mask_of_scores,
    with_background,
)

PLAIN = PseudoMaskSettings(crf=None)


def test_background_by_hand() -> None:
    cam = np.array([[[0.0, 0.5, 1.0]], [[0.2, 0.1, 0.0]]], np.float32)
    power = with_background(cam, PseudoMaskSettings(alpha=4.0))
    np.testing.assert_allclose(power[:, 0], [[0.8**4, 0.5**4, 0], [0, 0.5, 1], [0.2, 0.1, 0]], rtol=1e-6)
    constant = with_background(cam, PseudoMaskSettings(background="constant", background_score=0.15))
    np.testing.assert_allclose(constant[0], 0.15, rtol=1e-6)


def test_background_is_finite_for_maps_rounded_above_one() -> None:
    cam = np.full((1, 2, 2), np.nextafter(np.float32(1), np.float32(2)), np.float32)
    assert np.array_equal(with_background(cam, PseudoMaskSettings(alpha=3.5))[0], np.zeros((2, 2)))


def test_constant_background_without_crf_is_the_cam_label_map(rng: np.random.Generator) -> None:
    cam = rng.random((2, 6, 8)).astype(np.float32) * 0.4
    image = rng.integers(0, 256, (24, 31, 3)).astype(np.uint8)
    settings = PseudoMaskSettings(background="constant", background_score=0.15, crf=None)
    pseudo = make_pseudo_mask(cam, [4, 1], image, settings)
    assert np.array_equal(pseudo.mask, cam_to_labels(upsample_cam(cam, 24, 31), [4, 1], 0.15))
    assert pseudo.mask.dtype == np.uint8
    assert pseudo.class_ids == (2, 5)


def test_numbers_by_hand() -> None:
    """Four cells at the size of the image: scores 1 / 0, 0.5 / 0.5^2, 0.6 / 0.4^2 and 0 / 1 against background."""
    cam = np.array([[[1.0, 0.5], [0.6, 0.0]]], np.float32)
    image = np.zeros((2, 2, 3), np.uint8)
    chosen = np.array([[1.0, 0.5 / 0.75], [0.6 / 0.76, 1.0]])
    pseudo = make_pseudo_mask(cam, [7], image, PseudoMaskSettings(alpha=2.0, crf=None))
    assert pseudo.mask.tolist() == [[8, 8], [8, 0]]
    assert (pseudo.coverage_frac, pseudo.ignore_frac, pseudo.class_ids) == (0.75, 0.0, (8,))
    assert pseudo.confidence == pytest.approx(chosen.mean(), rel=1e-6)
    np.testing.assert_allclose(pseudo.chosen, chosen, rtol=1e-6)
    assert confidence_levels(pseudo.chosen).tolist() == [[255, 170], [201, 255]]  # 255 * 2 / 3, 255 * 0.6 / 0.76
    strict = make_pseudo_mask(cam, [7], image, PseudoMaskSettings(alpha=2.0, crf=None, min_confidence=0.7))
    assert strict.mask.tolist() == [[8, IGNORE], [8, 0]]
    assert strict.labels.tolist() == [[8, 8], [8, 0]]
    assert (strict.coverage_frac, strict.ignore_frac) == (0.5, 0.25)
    assert strict.confidence == pytest.approx((1 + 0.6 / 0.76 + 1) / 3, rel=1e-6)


def test_nothing_confident_is_all_ignore() -> None:
    cam = np.full((1, 2, 2), 0.4, np.float32)
    settings = PseudoMaskSettings(background="constant", background_score=0.4, crf=None, min_confidence=0.9)
    pseudo = make_pseudo_mask(cam, [0], np.zeros((5, 5, 3), np.uint8), settings)
    assert np.array_equal(pseudo.mask, np.full((5, 5), IGNORE))
    assert (pseudo.confidence, pseudo.coverage_frac, pseudo.ignore_frac, pseudo.class_ids) == (0.0, 0.0, 1.0, ())


def test_image_without_a_class_is_background() -> None:
    pseudo = make_pseudo_mask(np.zeros((0, 3, 4), np.float32), [], np.zeros((12, 16, 3), np.uint8), PLAIN)
    assert pseudo.mask.shape == (12, 16)
    assert not pseudo.mask.any()
    assert (pseudo.confidence, pseudo.coverage_frac, pseudo.ignore_frac, pseudo.class_ids) == (1.0, 0.0, 0.0, ())


def test_crf_brings_a_coarse_map_to_the_edge_of_the_object() -> None:
    image = np.full((48, 64, 3), 30, np.uint8)
    image[12:36, 20:44] = (210, 60, 50)
    cam = np.zeros((1, 12, 16), np.float32)
    cam[0, 2:10, 4:12] = 0.9
    truth = np.zeros((48, 64), np.uint8)
    truth[12:36, 20:44] = 3
    rough = make_pseudo_mask(cam, [2], image, PseudoMaskSettings(alpha=4.0, crf=None))
    fine = make_pseudo_mask(cam, [2], image, PseudoMaskSettings(alpha=4.0, crf=CrfSettings()))
    assert (rough.mask == truth).mean() < 0.9
    assert (fine.mask == truth).mean() > 0.99


def test_higher_alpha_means_less_background(rng: np.random.Generator) -> None:
    cam, image = rng.random((1, 8, 8)).astype(np.float32), np.zeros((32, 32, 3), np.uint8)
    covered = [
        make_pseudo_mask(cam, [0], image, PseudoMaskSettings(alpha=alpha, crf=None)).coverage_frac
        for alpha in (2.0, 4.0, 16.0, 32.0)
    ]
    assert covered == sorted(covered)
    assert covered[0] < covered[-1]


@pytest.mark.parametrize(
    ("cam", "class_indices", "message"),
    [
        (np.full((1, 2, 2), 255, np.float32), [0], "0..255 maps"),
        (np.full((1, 2, 2), np.nan, np.float32), [0], "expected finite values"),
        (np.zeros((1, 2, 2), np.float32), [0, 1], "for 2 present classes"),
        (np.zeros((2, 2, 2), np.float32), [1, 1], "twice"),
        (np.zeros((1, 2, 2), np.float32), [-1], "class_index -1"),
        (np.zeros((1, 2, 2), np.float32), [254], "class_index 254"),
    ],
)
def test_errors(cam: np.ndarray, class_indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pseudo_mask(cam, class_indices, np.zeros((8, 8, 3), np.uint8), PLAIN)


def test_image_must_be_rgb_bytes() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        make_pseudo_mask(np.zeros((1, 2, 2), np.float32), [0], np.zeros((8, 8), np.uint8), PLAIN)


def test_none_in_toml_is_no_crf() -> None:
    assert PseudoMaskSettings.model_validate_json('{"crf": "none"}').crf is None
    with pytest.raises(ValidationError):
        PseudoMaskSettings.model_validate_json('{"crf": "off"}')


def test_settings_are_checked() -> None:
    for change in ({"alpha": 0.0}, {"min_confidence": 1.5}, {"background": "none"}):
        with pytest.raises(ValidationError):
            PseudoMaskSettings(**change)  # type: ignore[arg-type]


def test_without_background_only_the_maps_compete() -> None:
    """By hand: scores 0.9 / 0.3, 0.2 / 0.6 and 0 / 0; no background score wins where all maps are low."""
    cam = np.array([[[0.9, 0.2, 0.0]], [[0.3, 0.6, 0.0]]], np.float32)
    image = np.zeros((1, 3, 3), np.uint8)
    pseudo = make_pseudo_mask(cam, [0, 1], image, PLAIN, has_background=False)
    assert pseudo.mask.tolist() == [[1, 2, 1]]
    assert (pseudo.coverage_frac, pseudo.ignore_frac, pseudo.class_ids) == (1.0, 0.0, (1, 2))
    assert pseudo.confidence == pytest.approx((0.75 + 0.75 + 0.5) / 3, rel=1e-6)
    ids, probability = class_probability(cam, [0, 1], image, PLAIN, has_background=False)
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(probability[:, 0], [[0.75, 0.25, 0.5], [0.25, 0.75, 0.5]], rtol=1e-6)
    assert cam[0, 0, 0] == np.float32(0.9)  # not in place


def test_without_background_one_class_is_everywhere_and_none_is_unknown(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    only = make_pseudo_mask(np.zeros((1, 2, 2), np.float32), [4], image, PseudoMaskSettings(), has_background=False)
    assert (only.mask == 5).all()
    assert (only.confidence, only.class_ids) == (1.0, (5,))
    none = make_pseudo_mask(np.zeros((0, 2, 2), np.float32), [], image, PLAIN, has_background=False)
    assert (none.mask == IGNORE).all()
    assert (none.confidence, none.coverage_frac, none.ignore_frac, none.class_ids) == (0.0, 0.0, 1.0, ())


def test_probability_is_what_the_mask_is_made_of(rng: np.random.Generator) -> None:
    cam, image = rng.random((2, 4, 5)).astype(np.float32), rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
    for settings in (PLAIN, PseudoMaskSettings(min_confidence=0.6)):
        ids, probability = class_probability(cam, [3, 1], image, settings)
        assert ids.tolist() == [0, 4, 2]
        np.testing.assert_allclose(probability.sum(axis=0), 1, rtol=1e-5)
        pseudo = make_pseudo_mask(cam, [3, 1], image, settings)
        np.testing.assert_array_equal(pseudo.labels, ids[probability.argmax(axis=0)])
        np.testing.assert_array_equal(pseudo.mask == IGNORE, probability.max(axis=0) < settings.min_confidence)


def test_a_crf_without_kernels_is_none(rng: np.random.Generator) -> None:
    scores, image = rng.random((3, 9, 7)).astype(np.float32), rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    none = CrfSettings(spatial_weight=0, bilateral_weight=0)
    found = mask_of_scores(scores, [4, 1], image, PseudoMaskSettings(crf=none))
    plain = mask_of_scores(scores, [4, 1], image, PLAIN)
    np.testing.assert_array_equal(found.mask, plain.mask)
    np.testing.assert_array_equal(plain.labels, labels_of_scores(scores, [4, 1]))
    assert found.confidence == pytest.approx(plain.confidence, rel=1e-5)


def test_labels_of_scores_by_hand() -> None:
    scores = np.array([[[0.5, 0.1, 0.2]], [[0.4, 0.3, 0.2]], [[0.1, 0.6, 0.2]]])
    assert labels_of_scores(scores, [4, 1]).tolist() == [[0, 2, 0]]
