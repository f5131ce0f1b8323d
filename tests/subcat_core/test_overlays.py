"""overlays: colours, contour lines, sizes and encodings against hand-computed values."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from subcat_core import overlays
from subcat_core.classes import IGNORE, ClassTable

PALETTE = ClassTable(("cat", "dog")).palette


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_colour_map_rises_in_lightness_and_hits_its_ends() -> None:
    colours = overlays.colour_map(np.linspace(0, 1, 101)).astype(float)
    assert tuple(colours[0]) == (0, 0, 4)
    assert tuple(colours[-1]) == (252, 255, 164)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_colour_map_clips_and_takes_nan_as_zero() -> None:
    assert overlays.colour_map(np.array([-3.0, 7.0, np.nan])).tolist() == [[0, 0, 4], [252, 255, 164], [0, 0, 4]]


def test_contour_lines_by_hand() -> None:
    regions = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert overlays.contour_lines(regions).tolist() == [
        [False, True, False],
        [True, True, True],
        [False, False, False],
    ]


def test_contour_lines_of_one_region_is_empty() -> None:
    assert not overlays.contour_lines(np.full((4, 5), 3)).any()


def test_mask_overlay_leaves_background_and_tints_classes(image: np.ndarray) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 10:] = 2
    result = overlays.mask_overlay(image, mask, PALETTE, 0.5)
    assert (result[:, :9] == image[:, :9]).all()
    assert (result[:, 9] == 255).all()  # the contour line
    expected = np.rint(image[5, 20] * np.float32(0.5) + np.array(PALETTE[2], np.float32) * np.float32(0.5))
    assert result[5, 20].tolist() == expected.tolist()


def test_mask_overlay_hatches_ignore(image: np.ndarray) -> None:
    result = overlays.mask_overlay(image, np.full((20, 30), IGNORE, np.uint8), PALETTE, 1.0)
    pale = (result == 224).all(axis=-1)
    assert 0.4 < pale.mean() < 0.6


def test_mask_overlay_names_foreign_ids_and_sizes(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"class ids \[7\].*ends at 2"):
        overlays.mask_overlay(image, np.full((20, 30), 7, np.uint8), PALETTE)
    with pytest.raises(ValueError, match="20 x 30 and the mask 30 x 20"):
        overlays.mask_overlay(image, np.zeros((30, 20), np.uint8), PALETTE)


def test_cam_overlay_shows_the_image_at_zero_and_the_colour_at_one() -> None:
    grey = np.full((4, 6, 3), 100, np.uint8)
    cam = np.zeros((4, 6), np.float32)
    cam[:, 3:] = 1.0
    result = overlays.cam_overlay(grey, cam, 1.0)
    assert result[0, 0].tolist() == [100, 100, 100]
    assert result[0, 5].tolist() == [252, 255, 164]
    lined = overlays.cam_overlay(grey, cam, 1.0, level=0.5)
    assert (lined[:, 2] == 255).all()


def test_cam_overlay_wants_the_cam_at_image_size(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="bring the cam to the image's size"):
        overlays.cam_overlay(image, np.zeros((5, 8), np.float32))


@pytest.mark.parametrize(
    ("shape", "expected"), [((20, 30, 3), (10, 15, 3)), ((30, 20, 3), (15, 10, 3)), ((1, 900, 3), (1, 15, 3))]
)
def test_thumbnail_keeps_the_aspect(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert overlays.thumbnail(np.zeros(shape, np.uint8), 15).shape == expected


def test_thumbnail_never_enlarges_nor_mixes_class_ids(image: np.ndarray) -> None:
    assert overlays.thumbnail(image, 500) is image
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 200
    assert set(np.unique(overlays.thumbnail(mask, 7))) == {0, 200}
    with pytest.raises(ValueError, match="at least 1"):
        overlays.thumbnail(image, 0)


def test_square_takes_the_middle() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (overlays.square(image, 8) == 200).all()
    assert overlays.square(np.zeros((1, 1, 3), np.uint8), 8).shape == (8, 8, 3)


def test_strip_and_contact_sheet_sizes(image: np.ndarray) -> None:
    one = overlays.strip([("image", image), ("nothing", None)], side_px=30)
    assert one.shape == (20 + 18 + 6 + 6, 2 * 36 + 6, 3)
    two = overlays.contact_sheet(
        [[("a caption far too long for its cell", image)], [("b", image), ("c", image)]], side_px=30
    )
    assert two.shape == (2 * (20 + 18 + 6) + 6, 2 * 36 + 6, 3)
    with pytest.raises(ValueError, match="no panels"):
        overlays.contact_sheet([])


def test_encodings_come_back(image: np.ndarray) -> None:
    png = overlays.to_png(image)
    assert (np.asarray(Image.open(io.BytesIO(png))) == image).all()
    uri = overlays.data_uri(png)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.split(",")[1]) == png
    assert overlays.data_uri(overlays.to_jpeg(image)).startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="PNG or JPEG"):
        overlays.data_uri(b"GIF89a")
