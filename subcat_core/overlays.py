"""The pictures people look at: masks and CAMs over their image, strips and contact sheets, encoded for a page.

Legend: H W pixels, C parent classes. Pictures are (H, W, 3) uint8 RGB throughout.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from subcat_core.classes import BACKGROUND, IGNORE

Colour = tuple[int, int, int]
Panel = tuple[str, np.ndarray | None]

# Nine anchors of "inferno" (matplotlib, CC0): lightness rises evenly, so a CAM reads right in grey and colour-blind.
_INFERNO = (
    (0, 0, 4),
    (31, 12, 72),
    (87, 16, 110),
    (138, 34, 106),
    (188, 55, 84),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
_IGNORE_RGB = (224, 224, 224)
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (40, 44, 52)
_EMPTY: Colour = (238, 240, 243)


def colour_map(values: np.ndarray) -> np.ndarray:
    """Perceptually even colours for values in 0..1.

    values: any shape, float; clipped to 0..1, NaN counts as 0. Returns the same shape + (3,) uint8 RGB.
    """
    clipped = np.clip(np.nan_to_num(np.asarray(values, np.float32)), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_INFERNO))
    anchors = np.asarray(_INFERNO, np.float32)
    channels = [np.interp(clipped, stops, anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def contour_lines(regions: np.ndarray) -> np.ndarray:
    """Borders between regions: True on the pixel left of or above a neighbour with another value.

    regions: (H, W) of any dtype, such as class ids or booleans. Returns (H, W) bool.
    """
    lines = np.zeros(regions.shape, bool)
    lines[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    lines[:-1, :] |= regions[:-1, :] != regions[1:, :]
    return lines


def mask_overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Colour], alpha: float = 0.6) -> np.ndarray:
    """A mask over its image: background stays as it is, classes are tinted and outlined, IGNORE is hatched pale.

    image: (H, W, 3) uint8. mask: (H, W) uint8 class ids, 0 background, 255 IGNORE. palette: (C + 1) RGB by class_id.
    alpha: 0 shows the image only, 1 the colours only. Returns (H, W, 3) uint8.
    Raises ValueError where the sizes differ or the mask holds a class_id that the palette lacks.
    """
    _check_size(image, mask, "mask")
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = palette
    table[IGNORE] = _IGNORE_RGB
    foreign = [int(value) for value in np.unique(mask) if len(palette) <= value < IGNORE]
    if foreign:
        raise ValueError(
            f"mask_overlay: the mask holds class ids {foreign}, but the palette ends at {len(palette) - 1}; "
            "pass the palette of the class table that made the mask"
        )
    diagonals = np.add.outer(np.arange(mask.shape[0]), np.arange(mask.shape[1]))
    hatched = (mask == IGNORE) & (diagonals % 6 < 3)
    tinted = ((mask != BACKGROUND) & (mask != IGNORE)) | hatched
    blend = np.where(tinted, np.float32(alpha), np.float32(0.0))[..., None]
    result = image * (1.0 - blend) + table[mask] * blend
    result[contour_lines(mask)] = (255.0, 255.0, 255.0)
    return np.rint(result).astype(np.uint8)


def cam_overlay(image: np.ndarray, cam: np.ndarray, alpha: float = 0.75, *, level: float | None = None) -> np.ndarray:
    """A CAM over its image, which shows through in grey where the CAM is low.

    image: (H, W, 3) uint8. cam: (H, W) float, 0..1, at the image's size. alpha: opacity where the CAM is 1.
    level: a threshold in 0..1 drawn as a white contour line; None draws none. Returns (H, W, 3) uint8.
    Raises ValueError where the sizes differ.
    """
    _check_size(image, cam, "cam")
    clipped = np.clip(np.nan_to_num(np.asarray(cam, np.float32)), 0.0, 1.0)
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    base = 0.35 * image + 0.65 * grey[..., None]
    # The square root lets the middle of the scale show; a linear blend hides all but the peak.
    blend = (alpha * np.sqrt(clipped))[..., None]
    result = base * (1.0 - blend) + colour_map(clipped) * blend
    if level is not None:
        result[contour_lines(clipped > level)] = (255.0, 255.0, 255.0)
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def thumbnail(image: np.ndarray, side_px: int) -> np.ndarray:
    """The image with its long side brought down to side_px; a smaller one stays as it is.

    image: (H, W, 3) uint8, or (H, W) uint8 class ids, which are never mixed (nearest). Returns the same kind of array.
    """
    if side_px < 1:
        raise ValueError(f"thumbnail: side_px is {side_px}; it must be at least 1")
    height, width = image.shape[0], image.shape[1]
    scale = side_px / max(height, width)
    if scale >= 1.0:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resample = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size, resample))


def square(image: np.ndarray, side_px: int) -> np.ndarray:
    """The middle square of an image at side_px by side_px: tiles of a gallery. image: (H, W, 3) uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    cut = Image.fromarray(np.ascontiguousarray(image[top : top + short, left : left + short]))
    return np.asarray(cut.resize((side_px, side_px), Image.Resampling.LANCZOS))


def strip(panels: Sequence[Panel], *, side_px: int = 160) -> np.ndarray:
    """Captioned panels in one row. panels: (caption, picture or None); None leaves a pale box."""
    return contact_sheet([panels], side_px=side_px)


def contact_sheet(rows: Sequence[Sequence[Panel]], *, side_px: int = 160) -> np.ndarray:
    """Captioned panels in rows of equal cells; a cell is side_px wide. Returns (H, W, 3) uint8.

    rows: lists of (caption, picture or None); a None leaves a pale box, short rows end in white.
    Raises ValueError where there is no panel at all.
    """
    num_columns = max((len(row) for row in rows), default=0)
    if num_columns == 0:
        raise ValueError("contact_sheet: no panels; pass at least one row with one panel")
    gap_px, caption_px = 6, 18
    cell_px = side_px + gap_px
    heights = [_row_height(row, side_px) + caption_px + gap_px for row in rows]
    sheet = Image.new("RGB", (num_columns * cell_px + gap_px, sum(heights) + gap_px), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    top = gap_px
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            left = gap_px + column * cell_px
            draw.text((left, top), _fitted(caption, font, side_px), fill=_INK, font=font)
            body = top + caption_px
            if picture is None:
                draw.rectangle((left, body, left + side_px - 1, body + height - caption_px - gap_px - 1), fill=_EMPTY)
            else:
                sheet.paste(Image.fromarray(thumbnail(picture, side_px)), (left, body))
        top += height
    return np.asarray(sheet)


def to_png(image: np.ndarray) -> bytes:
    """Lossless bytes: for masks and flat drawings. image: (H, W, 3) uint8."""
    return _encoded(image, "PNG", optimize=True)


def to_jpeg(image: np.ndarray, quality: int = 82) -> bytes:
    """Small bytes: for photographs and CAM overlays. image: (H, W, 3) uint8."""
    return _encoded(image, "JPEG", quality=quality, optimize=True)


def data_uri(data: bytes) -> str:
    """Encoded picture -> `data:` URI, so that a page holds its own pictures. Raises ValueError for other bytes."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"\xff\xd8"):
        kind = "jpeg"
    else:
        raise ValueError(f"data_uri: the bytes begin with {data[:4]!r}; pass PNG or JPEG bytes")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _encoded(image: np.ndarray, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def _check_size(image: np.ndarray, plane: np.ndarray, name: str) -> None:
    if image.shape[:2] != plane.shape:
        raise ValueError(
            f"{name}_overlay: the image is {image.shape[0]} x {image.shape[1]} and the {name} "
            f"{' x '.join(str(side) for side in plane.shape)} pixels; bring the {name} to the image's size first"
        )


def _row_height(row: Sequence[Panel], side_px: int) -> int:
    heights = [thumbnail(picture, side_px).shape[0] for _, picture in row if picture is not None]
    return max(heights, default=side_px)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
