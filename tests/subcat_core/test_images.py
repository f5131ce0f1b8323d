"""Decoding is strict and shows what a viewer shows; masks are indices; crops follow from rng and fit their masks."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from subcat_core import images
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.images import (
    AugmentSettings,
    ImageError,
    MaskValueError,
    augment,
    decode_image,
    decode_mask,
    encode_mask,
    read_size,
    resize,
    resize_mask,
    resize_short_side,
)
from subcat_core.random_crop import jitter_colours

CLASSES = ClassTable(("cat", "dog"))
GREY = (128, 128, 128)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(rng: np.random.Generator, height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth picture, so that JPEG keeps it closely."""
    small = Image.fromarray(rng.integers(0, 255, (5, 7, 3)).astype(np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def test_rgb_png_comes_back_exactly_and_writable(rng: np.random.Generator) -> None:
    pixels = picture(rng)
    decoded = decode_image(encoded(Image.fromarray(pixels)))
    assert np.array_equal(decoded, pixels)
    assert decoded.flags.writeable


def test_grey_palette_and_bilevel_become_rgb() -> None:
    grey = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    expected = np.repeat(np.array([[0, 100], [200, 255]], np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(decode_image(encoded(grey)), expected)
    indexed = encode_mask(np.array([[0, 1]], np.uint8), CLASSES.flat_palette())
    assert decode_image(indexed).tolist() == [[[0, 0, 0], list(CLASSES.palette[1])]]
    assert decode_image(encoded(Image.new("1", (2, 1), 1))).tolist() == [[[255] * 3, [255] * 3]]


def test_cmyk_jpeg_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    red = decode_image(encoded(cmyk, "JPEG", quality=95))
    assert red.shape == (16, 16, 3)
    assert np.abs(red.astype(int) - (255, 0, 0)).max() <= 3


def test_16_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 255, 256, 0x8000, 65535]], np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_transparent_pixels_lie_over_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    assert decode_image(encoded(Image.fromarray(rgba))).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_counted_in_the_size(orientation: int, rng: np.random.Generator) -> None:
    from PIL import ImageOps

    image = Image.fromarray(picture(rng))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data), expected)
    assert read_size(data) == expected.shape[:2] == ((60, 40) if orientation >= 5 else (40, 60))


def test_one_pixel_image_goes_the_whole_way(rng: np.random.Generator) -> None:
    image = decode_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7))))
    assert image.tolist() == [[[9, 8, 7]]]
    crop, _ = augment(image, AugmentSettings(crop_px=32), rng, pad_rgb=GREY)
    assert crop.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("keep_frac", [0.0, 0.02, 0.3, 0.7])
def test_truncated_files_raise_and_are_not_padded(kind: str, keep_frac: float, rng: np.random.Generator) -> None:
    from PIL import ImageFile

    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
    data = encoded(noise, kind)
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as another library may have left it
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * keep_frac)])


def test_corrupt_bytes_never_raise_anything_else(rng: np.random.Generator) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        good = encoded(Image.fromarray(picture(rng)), kind)
        for _ in range(60):
            data = bytearray(good)
            for position in rng.integers(0, len(data), 8):
                data[position] = int(rng.integers(256))
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(data)).ndim == 3


def test_other_bytes_are_named_by_their_start() -> None:
    with pytest.raises(ImageError, match=r"cannot be identified.*<html"):
        decode_image(b"<html>404 not found</html>")
    with pytest.raises(ImageError, match="empty file"):
        decode_image(b"")


def test_decompression_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="tiles"):
        read_size(encoded(Image.new("RGB", (11, 10))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ImageError, match="tiles"):
        decode_image(encoded(Image.new("RGB", (9, 10))))


def test_mask_round_trip_is_by_index_and_not_by_colour(rng: np.random.Generator) -> None:
    mask = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (13, 7))
    data = encode_mask(mask, CLASSES.flat_palette())
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.array_equal(decode_mask(data, CLASSES.mask_lut()), mask)
    grey = encoded(Image.fromarray(mask))
    assert np.array_equal(decode_mask(grey, CLASSES.mask_lut()), mask)


def test_stored_mask_values_go_through_the_class_table() -> None:
    table = ClassTable(("gland",), {0: 0, 255: 1, 7: IGNORE})
    data = encoded(Image.fromarray(np.array([[0, 255, 7]], np.uint8)))
    assert decode_mask(data, table.mask_lut()).tolist() == [[0, 1, IGNORE]]


def test_palette_mask_saved_as_grey_or_colours_is_named(rng: np.random.Generator) -> None:
    palette_mask = Image.open(io.BytesIO(encode_mask(np.array([[0, 1, 2]], np.uint8), CLASSES.flat_palette())))
    with pytest.raises(MaskValueError, match=r"outside the class table \(it has 0..2, 255\).*read as grey"):
        decode_mask(encoded(palette_mask.convert("L")), CLASSES.mask_lut())
    with pytest.raises(MaskValueError, match="mode RGB: it holds colours"):
        decode_mask(encoded(palette_mask.convert("RGB")), CLASSES.mask_lut())
    with pytest.raises(MaskValueError, match="from 0 to 700"):
        decode_mask(encoded(Image.fromarray(np.array([[0, 700]], np.uint16))), CLASSES.mask_lut())
    noise = encode_mask(rng.integers(0, 3, (64, 64)).astype(np.uint8), CLASSES.flat_palette())
    with pytest.raises(ImageError, match="PNG is corrupt or truncated"):
        decode_mask(noise[: len(noise) // 2], CLASSES.mask_lut())


def test_encode_mask_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W\) uint8"):
        encode_mask(np.zeros((2, 2), np.int64), CLASSES.flat_palette())


@pytest.mark.parametrize("size", [(20, 30), (80, 120), (33, 47)])
def test_resize_is_close_to_pillow(size: tuple[int, int], rng: np.random.Generator) -> None:
    image = picture(rng)
    expected = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    assert np.abs(resize(image, *size).astype(int) - np.asarray(expected)).max() <= 2
    read_only = np.broadcast_to(image, image.shape)
    assert np.array_equal(resize(read_only, *size), resize(image, *size))


def test_resize_mask_makes_no_new_values(rng: np.random.Generator) -> None:
    mask = rng.choice(np.array([0, 7, IGNORE], np.uint8), (9, 11))
    assert resize_mask(np.array([[1, 2]], np.uint8), 2, 4).tolist() == [[1, 1, 2, 2]] * 2
    assert set(np.unique(resize_mask(mask, 31, 5))) <= {0, 7, IGNORE}


def test_resize_short_side_bounds_strips() -> None:
    assert resize_short_side(np.zeros((40, 60, 3), np.uint8), 20).shape == (20, 30, 3)
    assert resize_short_side(np.zeros((1, 5000, 3), np.uint8), 100).shape == (1, 800, 3)


@pytest.mark.parametrize(("side", "expected"), [("short", (64, 96)), ("long", (43, 64))])
def test_augment_resizes_the_side_it_is_told(side: str, expected: tuple[int, int], rng: np.random.Generator) -> None:
    settings = AugmentSettings.model_validate(
        {"resize_side": side, "resize_min_px": 64, "resize_max_px": 64, "crop_px": 128, "jitter": (0.0,) * 4}
    )
    crop, _ = augment(np.full((40, 60, 3), 200, np.uint8), settings, rng, pad_rgb=(1, 2, 3))
    inside = (crop == 200).all(axis=0)
    assert (inside.any(axis=1).sum(), inside.any(axis=0).sum()) == expected
    assert (crop[:, ~inside] == np.array([[1], [2], [3]])).all()


def test_augment_keeps_image_and_mask_together(rng: np.random.Generator) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:30, 8:33] = 1
    image = np.repeat((mask * 200)[..., None], 3, axis=2)
    settings = AugmentSettings(resize_min_px=40, resize_max_px=40, crop_px=50, jitter=(0.0, 0.0, 0.0, 0.0))
    flipped = set()
    for _ in range(12):
        crop, mask_crop = augment(image, settings, rng, pad_rgb=(77, 77, 77), mask=mask)
        assert mask_crop is not None
        assert np.array_equal(mask_crop == 1, crop[0] == 200)
        assert np.array_equal(mask_crop == IGNORE, crop[0] == 77)
        flipped.add(int(np.flatnonzero((mask_crop == 1).any(axis=0))[0]))
    assert len(flipped) > 2


def test_augment_turns_image_and_mask_into_all_orientations(rng: np.random.Generator) -> None:
    mask = np.arange(9, dtype=np.uint8).reshape(3, 3).repeat(4, axis=0).repeat(4, axis=1)  # 3 x 3 fields of 4 px
    image = np.repeat(mask[..., None] * 20, 3, axis=2)
    sizes = {"resize_min_px": 12, "resize_max_px": 12, "crop_px": 12, "jitter": (0.0,) * 4}
    seen = set()
    for _ in range(100):
        crop, turned = augment(image, AugmentSettings(any_orientation=True, **sizes), rng, pad_rgb=(0, 0, 0), mask=mask)
        assert turned is not None
        assert np.array_equal(crop[0], turned * 20)
        seen.add(turned[::4, ::4].tobytes())
    fields = np.arange(9, dtype=np.uint8).reshape(3, 3)
    turns = [np.rot90(fields, k) for k in range(4)]
    assert seen == {each.tobytes() for turn in turns for each in (turn, turn[:, ::-1])}
    never, always = AugmentSettings(**sizes), AugmentSettings(any_orientation=True, **sizes)
    assert always.model_dump() == {**never.model_dump(), "any_orientation": True}  # fingerprints without it stay


def test_augment_cuts_all_values_of_a_pixel_alike(rng: np.random.Generator) -> None:
    mask = rng.integers(0, 250, (20, 30), dtype=np.uint8)
    settings = AugmentSettings(resize_min_px=25, resize_max_px=35, crop_px=40)
    image, both = np.repeat(mask[..., None], 3, axis=2), np.stack([mask, 250 - mask], axis=2)
    _, alone = augment(image, settings, np.random.default_rng(4), pad_rgb=(0, 0, 0), mask=mask)
    _, planes = augment(image, settings, np.random.default_rng(4), pad_rgb=(0, 0, 0), mask=both)
    assert alone is not None
    assert planes is not None
    np.testing.assert_array_equal(planes[..., 0], alone)
    np.testing.assert_array_equal(planes[..., 1], np.where(alone == IGNORE, IGNORE, 250 - alone))


def test_augment_draws_one_of_the_scales(rng: np.random.Generator) -> None:
    """Sizes as deeplab-pytorch has them: int(side * scale)."""
    settings = AugmentSettings(scales=(0.5, 1.0, 1.5), crop_px=128, jitter=(0.0,) * 4)
    seen = set()
    for _ in range(40):
        crop, _ = augment(np.full((41, 60, 3), 200, np.uint8), settings, rng, pad_rgb=(1, 2, 3))
        inside = (crop == 200).all(axis=0)
        seen.add((int(inside.any(axis=1).sum()), int(inside.any(axis=0).sum())))
    assert seen == {(20, 30), (41, 60), (61, 90)}
    assert settings.middle_px is None
    assert AugmentSettings(resize_min_px=100, resize_max_px=201).middle_px == 150


def test_augment_pads_at_the_end_before_the_flip(rng: np.random.Generator) -> None:
    mask = np.zeros((40, 30), np.uint8)
    mask[:, 0] = 1
    image = np.repeat((mask * 200 + 9)[..., None], 3, axis=2)
    settings = AugmentSettings(scales=(1.0,), crop_px=50, pad="end", jitter=(0.0,) * 4)
    lefts = set()
    for _ in range(12):
        crop, mask_crop = augment(image, settings, rng, pad_rgb=(77, 77, 77), mask=mask)
        assert mask_crop is not None
        assert np.array_equal(mask_crop == IGNORE, crop[0] == 77)
        assert np.array_equal(mask_crop == 1, crop[0] == 209)
        assert (mask_crop != IGNORE).any(axis=1).tolist() == [True] * 40 + [False] * 10
        lefts.add(int(np.flatnonzero((mask_crop == 1).any(axis=0))[0]))
        columns = np.flatnonzero((mask_crop != IGNORE).any(axis=0))
        assert (columns[0], columns[-1]) in ((0, 29), (20, 49))
    assert lefts == {0, 49}  # as it is, and mirrored with its padding


def test_padding_at_the_end_leaves_the_places_of_large_images(rng: np.random.Generator) -> None:
    image = picture(rng, 60, 80)
    for settings in (AugmentSettings(crop_px=32), AugmentSettings(crop_px=32, scales=(1.0,))):
        at_end = settings.model_copy(update={"pad": "end"})
        one, two = (augment(image, chosen, np.random.default_rng(3), pad_rgb=GREY)[0] for chosen in (settings, at_end))
        assert np.array_equal(one, two)


def test_augment_depends_on_the_generator_alone(rng: np.random.Generator) -> None:
    image, settings = picture(rng), AugmentSettings(crop_px=48)
    one, two, three = (augment(image, settings, np.random.default_rng(seed), pad_rgb=GREY)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    with pytest.raises(ValueError, match="same size"):
        augment(image, settings, rng, pad_rgb=GREY, mask=np.zeros((4, 4), np.uint8))


def test_augment_settings_name_the_rule() -> None:
    with pytest.raises(ValueError, match="below resize_min_px"):
        AugmentSettings(resize_min_px=10, resize_max_px=9)
    with pytest.raises(ValueError, match=r"hue 0..0.5"):
        AugmentSettings(jitter=(0.1, 0.1, 0.1, 0.6))


class _Drawn:
    """A generator whose draws are given."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.values.pop(0)

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_jitter_of_one_kind_is_torchvisions(position: int, rng: np.random.Generator) -> None:
    import torch
    from torchvision.transforms.v2 import functional

    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[position]
    image = picture(rng)
    strength = [0.0] * 4
    strength[position] = 0.3
    ours = jitter_colours(image, tuple(strength), _Drawn([1.0] * 4))  # type: ignore[arg-type]
    theirs = adjust(torch.from_numpy(image).permute(2, 0, 1), 1.3).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_hue_turns_colours_and_leaves_grey_and_luma() -> None:
    image = np.array([[[120, 120, 120], [140, 100, 90]]], np.uint8)
    turned = jitter_colours(image, (0.0, 0.0, 0.0, 0.1), _Drawn([1.0] * 4))  # type: ignore[arg-type]
    assert turned[0, 0].tolist() == [120, 120, 120]
    assert np.abs(turned[0, 1].astype(int) - image[0, 1]).max() >= 5
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(luma @ turned[0, 1] - luma @ image[0, 1]) <= 1


def test_more_pixels_are_read_where_asked_for_and_pillows_limit_stays(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pixels, mask = picture(rng, 20, 30), np.ones((20, 30), np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels)), 600), pixels)
    assert read_size(encoded(Image.fromarray(pixels)), 600) == (20, 30)
    stored = encode_mask(mask, CLASSES.flat_palette())
    assert np.array_equal(decode_mask(stored, CLASSES.mask_lut(), 600), mask)
    with pytest.raises(ImageError, match="20 x 30 px; expected 1 to 599 pixels"):
        decode_image(encoded(Image.fromarray(pixels)), 599)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ImageError, match="cut the image into tiles"):
        decode_image(encoded(Image.fromarray(pixels)))
