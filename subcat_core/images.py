"""Pictures as arrays: decode bytes strictly, read sizes, masks as indices, resize, and the random crop of training."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch.nn import functional as F

from subcat_core.classes import IGNORE
from subcat_core.random_crop import AugmentSettings, crop_span, jitter_colours

MAX_PIXELS = 89_478_485
"""More is taken for a decompression bomb: Pillow's own warning limit, 256 MiB of RGB."""
MAX_ASPECT = 8.0
"""A resized image's long side is at most this many times the asked short side, so that a 1 x 5000 strip stays small."""

# Formats that hold one picture of plain pixels. Others that Pillow reads (EPS, PDF, ...) run interpreters.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NUM_SHOWN = 8
_bomb_limit_lock = threading.Lock()


class ImageError(ValueError):
    """Bytes that are no usable image or mask; the message says what is wrong with them."""


class MaskValueError(ImageError):
    """A sound file whose pixels are not the class table's values: colours, grey levels of a palette, other classes."""


def decode_image(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, writable, as a viewer would show it.

    Grey, palette, CMYK and 16-bit images are converted (16-bit by its high 8 bits), transparency is laid over white,
    EXIF rotation applied; of several frames the first. Raises ImageError for anything corrupt, truncated, empty or
    above max_pixels (MAX_PIXELS unless given): nothing is padded. Takes 7 bytes a pixel at its peak, and 3 are left.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    _load(image)
    rgb = _to_rgb(image)
    return np.array(_turned(rgb, orientation))


def read_size(data: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """(height, width) in px after EXIF rotation, from the header alone. Raises ImageError as `decode_image` would."""
    image = _open(data, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def decode_mask(data: bytes, lut: np.ndarray, max_pixels: int | None = None) -> np.ndarray:
    """(H, W) uint8 class ids from a mask that stores one value a pixel.

    lut: (256,) int16, stored value -> class id, -1 where the value is not in the class table (`ClassTable.mask_lut`).
    A palette PNG is read by its indices, never by its colours. Raises MaskValueError for masks of colours, of more
    than 8 bits in use, and for values outside the table, naming them; ImageError for broken files and for more than
    max_pixels (MAX_PIXELS unless given). Takes about 10 bytes a pixel at its peak.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    _load(image)
    stored = np.asarray(_turned(image, orientation))
    if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        raise MaskValueError(
            f"mask of mode {image.mode}: it holds colours, not class ids; save an indexed (mode P) or 8-bit grey PNG "
            "whose pixel values are class ids"
        )
    if image.mode.startswith("I") and (stored.min() < 0 or stored.max() > 255):
        raise MaskValueError(f"mask values go from {stored.min()} to {stored.max()}; save 8-bit values, 0..255")
    stored = stored.astype(np.uint8)
    present = np.flatnonzero(np.bincount(stored.ravel(), minlength=256))
    unknown = present[lut[present] < 0]
    if unknown.size:
        raise MaskValueError(_unknown_values(unknown, lut, image.mode))
    return lut.astype(np.uint8)[stored]


def encode_mask(mask: np.ndarray, palette: bytes) -> bytes:
    """Indexed PNG of class ids. mask: (H, W) uint8. palette: 768 bytes of RGB (`ClassTable.flat_palette`)."""
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask: got {mask.dtype} of shape {mask.shape}; expected (H, W) uint8 with pixels")
    image = Image.frombytes("P", (mask.shape[1], mask.shape[0]), np.ascontiguousarray(mask).tobytes())
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, bicubic with antialias.

    By torch's uint8 kernels: within two grey levels of Pillow's, several times faster.
    """
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) or (H, W, 2..4) uint8 class ids -> (height, width, ...), nearest neighbour by Pillow's rule: centres, not
    corners.
    """
    if mask.shape[:2] == (height, width):
        return mask
    return np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def resize_short_side(image: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) uint8 with its short side brought to side_px; the long side stays below MAX_ASPECT * side_px."""
    return resize(image, *_resized_size(image.shape[0], image.shape[1], side_px, "short"))


def augment(
    image: np.ndarray,
    settings: AugmentSettings,
    rng: np.random.Generator,
    *,
    pad_rgb: tuple[int, int, int],
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """One training crop: resize, flip, crop at a random place, colour jitter, padding, quarter turns.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8 class ids, or None; with more values of each pixel (H, W, 2..4).
    pad_rgb: the backbone's mean colour, so that padding is zero after normalisation (authors' code). Returns
    (3, crop, crop) uint8 and the mask's (crop, crop, ...) uint8, padded with IGNORE. Deterministic for a given rng. The
    authors jitter the whole image before they crop; here the crop is jittered, before padding.
    """
    if mask is not None and mask.shape[:2] != image.shape[:2]:
        raise ValueError(f"mask of {mask.shape[:2]} px for an image of {image.shape[:2]} px; expected the same size")
    if settings.scales is None:
        side_px = int(rng.integers(settings.resize_min_px, settings.resize_max_px + 1))
        height, width = _resized_size(image.shape[0], image.shape[1], side_px, settings.resize_side)
    else:
        scale = settings.scales[int(rng.integers(len(settings.scales)))]
        height, width = max(1, int(image.shape[0] * scale)), max(1, int(image.shape[1] * scale))
    flip = bool(rng.random() < settings.flip_prob)
    at_end = settings.pad == "end"
    from_y, to_y = crop_span(height, settings.crop_px, rng, pad_end=at_end)
    from_x, to_x = crop_span(width, settings.crop_px, rng, pad_end=at_end)
    if flip and at_end:  # the padding is mirrored with the image
        to_x = slice(settings.crop_px - to_x.stop, settings.crop_px)

    def cut(pixels: np.ndarray) -> np.ndarray:
        return (pixels[:, ::-1] if flip else pixels)[from_y, from_x]

    crop = np.empty((settings.crop_px, settings.crop_px, 3), np.uint8)
    crop[:] = pad_rgb
    crop[to_y, to_x] = jitter_colours(cut(resize(image, height, width)), settings.jitter, rng)
    num_turns = int(rng.integers(4)) if settings.any_orientation else 0
    planes = np.ascontiguousarray(np.rot90(crop, num_turns).transpose(2, 0, 1))
    if mask is None:
        return planes, None
    mask_crop = np.full((settings.crop_px, settings.crop_px, *mask.shape[2:]), IGNORE, np.uint8)
    mask_crop[to_y, to_x] = cut(resize_mask(mask, height, width))
    return planes, np.ascontiguousarray(np.rot90(mask_crop, num_turns))


def centre_crop(image: np.ndarray, crop_px: int, pad_rgb: tuple[int, int, int]) -> np.ndarray:
    """The middle (3, crop, crop) uint8 of an image (H, W, 3) uint8, padded evenly where it is smaller."""
    height, width = min(image.shape[0], crop_px), min(image.shape[1], crop_px)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    to_y, to_x = (crop_px - height) // 2, (crop_px - width) // 2
    crop = np.empty((crop_px, crop_px, 3), np.uint8)
    crop[:] = pad_rgb
    crop[to_y : to_y + height, to_x : to_x + width] = image[top : top + height, left : left + width]
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def _open(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """The image with its header read."""
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        with _raised_bomb_limit() if limit > MAX_PIXELS else contextlib.nullcontext():
            image = Image.open(io.BytesIO(data), formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {limit} pixels; cut the image into tiles") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot be identified as an image; the file starts with {data[:8]!r}") from error
    except Exception as error:  # Pillow's readers raise whatever a corrupt header leads them to
        raise ImageError(f"header is corrupt or truncated ({_reason(error)})") from error
    width, height = image.size
    if not 0 < width * height <= limit:
        raise ImageError(f"{height} x {width} px; expected 1 to {limit} pixels: cut large images into tiles")
    return image


@contextlib.contextmanager
def _raised_bomb_limit() -> Iterator[None]:
    """Pillow's own limit lifted: it is one for the whole process. What is opened meanwhile is checked by ours."""
    with _bomb_limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of _FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _load(image: ImageFile.ImageFile) -> None:
    """Decode all pixels, or raise."""
    # Other libraries switch this on for the whole process, and truncated files would come padded with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in _open
        raise ImageError(f"{image.format} is corrupt or truncated ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or it cannot be read: broken metadata is no broken image."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking further would decode all pixels
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as in _open
        return 1
    return value if value in _TRANSPOSE else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_TRANSPOSE[orientation])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"32-bit pixels from {values.min()} to {values.max()}; save the image with 8 or 16 bits")
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _unknown_values(unknown: np.ndarray, lut: np.ndarray, mode: str) -> str:
    table = _ranges(np.flatnonzero(lut >= 0))
    text = f"mask values {_ranges(unknown)} are outside the class table (it has {table})"
    hint = "; a palette mask that was read as grey looks like this: save the indices, not the colours"
    return text + hint if mode == "L" else text


def _ranges(values: np.ndarray) -> str:
    """'0..6, 255' of sorted values."""
    parts = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    texts = [str(part[0]) if part.size == 1 else f"{part[0]}..{part[-1]}" for part in parts if part.size]
    return ", ".join(texts[:_NUM_SHOWN] + (["..."] if len(texts) > _NUM_SHOWN else []))


def _resized_size(height: int, width: int, side_px: int, side: str) -> tuple[int, int]:
    """(height, width) with the short or long side at side_px, at least 1 px each."""
    short, long = min(height, width), max(height, width)
    factor = side_px / long if side == "long" else min(side_px / short, MAX_ASPECT * side_px / long)
    return max(1, round(height * factor)), max(1, round(width * factor))
