"""Where tiles lie, which classes they show, and that putting them together again is the plain mean."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.classes import IGNORE
from subcat_core.images import decode_image
from subcat_core.tiles import Stitcher, encode_tile, stitch, tile_grid, tile_labels, tile_starts


def test_starts_by_hand() -> None:
    assert tile_starts(10, 4, 2) == [0, 2, 4, 6]
    assert tile_starts(11, 4, 2) == [0, 2, 4, 6, 7]  # the last one is flush with the end
    assert tile_starts(11, 4, 4) == [0, 4, 7]
    assert tile_starts(4, 4, 2) == [0]
    assert tile_starts(3, 4, 2) == [0]  # smaller than a tile


def test_the_literatures_117_tiles() -> None:
    grid = tile_grid(522, 775, 112, 56)
    assert len(grid) == 117
    assert grid[:2] == [(0, 0), (0, 56)]
    assert grid[-1] == (522 - 112, 775 - 112)
    assert grid == sorted(grid)  # row by row
    assert {len(tile_grid(*size, 112, 56)) for size in ((430, 567), (433, 574), (453, 589))} == {70, 80}


@pytest.mark.parametrize(("length", "tile", "stride"), [(10, 4, 5), (10, 4, 0), (0, 4, 2)])
def test_gaps_and_nothing_are_refused(length: int, tile: int, stride: int) -> None:
    with pytest.raises(ValueError, match="a longer stride would leave gaps"):
        tile_starts(length, tile, stride)


def test_labels_by_hand() -> None:
    mask = np.full((10, 10), 1, np.uint8)
    mask[0, :5] = 2  # 5 %: not more than 5 %
    mask[1, :6] = 3  # 6 %
    mask[2] = 0
    mask[3] = IGNORE
    assert tile_labels(mask, 4, 0.05) == [0, 2]
    assert tile_labels(mask, 4, 0.0) == [0, 1, 2]
    assert tile_labels(mask, 4, 0.9) == []
    with pytest.raises(ValueError, match="mask of int64"):
        tile_labels(mask.astype(np.int64), 4, 0.05)


def test_a_tile_comes_back_exactly(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encode_tile(pixels[2:9, 3:])), pixels[2:9, 3:])


def test_two_tiles_by_hand() -> None:
    left, right = np.full((1, 2, 3), 2.0, np.float32), np.full((1, 2, 3), 4.0, np.float32)
    [band] = stitch([(0, 0, left), (0, 2, right)], 1, 2, 5)
    np.testing.assert_array_equal(band.maps, np.tile(np.float32([2, 2, 3, 4, 4]), (1, 2, 1)))
    assert band.rows == slice(0, 2)


@pytest.mark.parametrize(
    ("height", "width", "tile", "stride"),
    [(23, 31, 8, 4), (23, 31, 8, 8), (24, 32, 8, 3), (5, 31, 8, 4), (23, 6, 8, 5)],
)
def test_agrees_with_the_plain_mean(rng: np.random.Generator, height: int, width: int, tile: int, stride: int) -> None:
    tiles = [
        (y, x, rng.random((3, min(tile, height), min(tile, width))).astype(np.float32))
        for y, x in tile_grid(height, width, tile, stride)
    ]
    expected = np.zeros((3, height, width), np.float64)
    for row in range(height):
        for column in range(width):
            values = [
                maps[:, row - y, column - x].astype(np.float64)
                for y, x, maps in tiles
                if 0 <= row - y < maps.shape[1] and 0 <= column - x < maps.shape[2]
            ]
            expected[:, row, column] = sum(values) / len(values)
    found = np.full((3, height, width), np.nan, np.float32)
    tops = []
    for band in stitch(tiles, 3, height, width):
        found[:, band.rows] = band.maps
        tops.append(band.top_px)
    assert np.abs(found - expected).max() < 1e-6
    assert tops == tile_starts(height, tile, stride)  # a band as soon as a row of tiles begins below it


def test_one_row_of_tiles_is_held_however_high_the_image() -> None:
    stitcher = Stitcher(2, 4000, 30)
    for y, x in tile_grid(4000, 30, 10, 5):
        stitcher.add(y, x, np.ones((2, 10, 10), np.float32))
        assert stitcher._sums.shape[1] <= 10
    assert stitcher.finish().rows == slice(3990, 4000)


def test_misplaced_and_missing_tiles_are_refused() -> None:
    maps = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"leaves the image of 6 x 6 px"):
        Stitcher(1, 6, 6).add(3, 0, maps)
    with pytest.raises(ValueError, match=r"got maps of \(1, 4, 4\), expected \(2, h, w\)"):
        Stitcher(2, 6, 6).add(0, 0, maps)
    stitcher = Stitcher(1, 6, 4)
    stitcher.add(0, 0, maps)
    stitcher.add(2, 0, maps)
    with pytest.raises(ValueError, match="give tiles row by row"):
        stitcher.add(0, 0, maps)
    with pytest.raises(ValueError, match=r"row 0 of the image has pixels that no tile covers"):
        list(stitch([(0, 0, maps), (2, 0, maps)], 1, 6, 6))
    with pytest.raises(ValueError, match=r"row 4 of the image has pixels that no tile covers"):
        list(stitch([(0, 0, maps)], 1, 6, 4))
    with pytest.raises(ValueError, match=r"row 4 of the image has pixels that no tile covers"):
        list(stitch([(0, 0, maps), (5, 0, maps)], 1, 9, 4))
