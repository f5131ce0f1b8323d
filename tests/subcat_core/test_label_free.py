"""The score without ground truth: by hand, against plain variance, and that it prefers what is right."""

import numpy as np
import pytest

from subcat_core.label_free import CELLS, LabelFreeGrid, clearly_better, explained_variance, region_score


def test_explained_variance_by_hand() -> None:
    # Mean 2; deviations -2, 0, 0, 2: total 8. Regions {0, 2} and {2, 4}: means 1 and 3, so 4 of 8 lie between them.
    values = np.array([[0.0], [2.0], [2.0], [4.0]])
    assert explained_variance(values, np.array([5, 5, 9, 9])) == pytest.approx(0.5)
    assert explained_variance(values, np.zeros(4, int)) == 0
    assert explained_variance(values, np.arange(4)) == pytest.approx(1)
    assert explained_variance(np.ones((4, 2)), np.array([0, 0, 1, 1])) == 0


def test_explained_variance_is_one_less_the_variance_within(rng: np.random.Generator) -> None:
    values, regions = rng.normal(size=(60, 3)), rng.integers(0, 4, 60)
    within = sum(((values[regions == k] - values[regions == k].mean(axis=0)) ** 2).sum() for k in range(4))
    total = ((values - values.mean(axis=0)) ** 2).sum()
    assert explained_variance(values, regions) == pytest.approx(1 - within / total, abs=1e-12)


def _image_with_square() -> tuple[np.ndarray, np.ndarray]:
    """(64, 96) picture, a bright square on a dark ground, and where it is."""
    inside = np.zeros((64, 96), bool)
    inside[16:48, 24:56] = True
    image = np.where(inside[..., None], [220, 40, 40], [30, 60, 90]).astype(np.uint8)
    return image, inside


def test_the_mask_of_the_object_scores_more_than_a_larger_and_a_smaller_one() -> None:
    image, inside = _image_with_square()
    grid = LabelFreeGrid(np.where(inside, 0.9, 0.1)[None].astype(np.float32), [3], image)
    smaller, larger = np.zeros_like(inside), np.zeros_like(inside)
    smaller[24:40, 32:48] = True
    larger[8:56, 16:64] = True
    right, low, high = (grid.mask_score(mask.astype(np.uint8) * 3) for mask in (inside, smaller, larger))
    assert right > 0.8
    assert right > max(low, high) + 0.2
    assert grid.mask_score(np.zeros_like(inside, np.uint8)) == pytest.approx(0)


def test_a_threshold_scores_as_the_mask_that_it_makes() -> None:
    image, inside = _image_with_square()
    cam = np.stack([np.where(inside, 0.8, 0.2), np.where(inside, 0.1, 0.3)]).astype(np.float32)
    grid = LabelFreeGrid(cam, [2, 5], image)
    assert grid.size == (CELLS, 30)
    cells = np.where(grid.strongest > 0.5, 2, 0).reshape(grid.size).astype(np.uint8)
    mask = np.kron(cells, np.ones((7, 7), np.uint8))  # larger than the grid, as masks are
    assert grid.threshold_scores([0.5])[0] == pytest.approx(grid.mask_score(mask))
    assert grid.threshold_scores([0.99])[0] == 0
    assert grid.mask_score(mask) == region_score(grid.strongest, grid.colours, cells.ravel()) > 0.5


def test_an_image_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 maps for 0 classes; expected one each, and at least one"):
        LabelFreeGrid(np.zeros((0, 4, 4)), [], np.zeros((8, 8, 3), np.uint8))


def test_without_background_by_hand() -> None:
    """Softmax maps 0.9, 0.7, 0.3, 0.1 of the first class; it wins in the first two cells.

    Deviations 0.4, 0.2, -0.2, -0.4: total 0.4; between the regions 4 x 0.3^2 = 0.36: 0.9, the second class being the
    mirror image. Colours 0, 0, 10, 20: mean 7.5, total 275; between 2 x 7.5^2 x 2 = 225.
    """
    first = np.array([0.9, 0.7, 0.3, 0.1])
    colours = np.array([[0.0], [0.0], [10.0], [20.0]])
    maps, regions = np.stack([first, 1 - first], axis=1), np.array([4, 4, 7, 7])
    assert region_score(maps, colours, regions, has_background=False) == pytest.approx(0.9 * 225 / 275)
    assert region_score(maps, colours, np.full(4, 4), has_background=False) == 0

    cells = np.zeros((40, 2), bool)
    cells[20:] = True
    image = np.where(cells[..., None], [200, 30, 30], [30, 30, 200]).astype(np.uint8)
    cam = np.stack([np.where(cells, 0.8, 0.2), np.where(cells, 0.2, 0.8)]).astype(np.float32)
    grid = LabelFreeGrid(cam, [1, 2], image, has_background=False)
    assert grid.threshold_scores([-1.0]).tolist() == pytest.approx([1.0])  # maps and colours have two values each
    assert grid.mask_score(np.where(cells, 1, 2).astype(np.uint8)) == pytest.approx(1.0)
    assert grid.mask_score(np.ones_like(cells, np.uint8)) == 0
    one = LabelFreeGrid(cam[:1], [1], image, has_background=False)
    assert one.threshold_scores([-1.0]).tolist() == [0.0]


def test_clearly_better_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3) = 0.577; 2 > 2 x 0.577, but not > 4 x 0.577.
    scores, than = np.array([1.0, 2.0, 3.0]), np.zeros(3)
    assert clearly_better(scores, than)
    assert not clearly_better(scores, than, num_errors=4)
    assert not clearly_better(than, scores)
    assert not clearly_better(np.array([1.0]), np.array([0.0]))
