"""The demo's creatures and places: six heads, six bodies that the classes share, six backgrounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jobs.demo_shapes import INK, Colour, Pen, value_noise

WHITE: Colour = (250, 248, 242)
ORANGE: Colour = (240, 150, 40)

# Every look serves three classes, so that a body alone tells nothing of the class.
# (shape, colour): what makes the sub-categories of a class.
LOOKS: tuple[tuple[str, Colour], ...] = (
    ("long", (205, 140, 80)),
    ("ball", (232, 218, 196)),
    ("tall", (122, 84, 62)),
    ("long", (128, 134, 146)),
    ("ball", (176, 110, 138)),
    ("tall", (92, 138, 176)),
)
# Units from a body's middle to its farthest point left or right, head and tail counted.
REACH = {"long": 51.0, "ball": 33.0, "tall": 33.0}
HEAD_AT: dict[str, tuple[float, float]] = {"long": (34.0, -19.0), "ball": (0.0, -31.0), "tall": (0.0, -40.0)}


def draw_creature(pen: Pen, name: str, look: int) -> None:
    """Body, then head, looking to the right. pen: origin at the body's centre; a creature is about 85 units high."""
    shape, colour = LOOKS[look]
    _BODIES[shape](pen, colour)
    head_colour = tuple(min(255.0, value * 1.06) for value in colour)
    _HEADS[name](pen.moved(*HEAD_AT[shape]), (head_colour[0], head_colour[1], head_colour[2]))


def draw_place(name: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float64 background."""
    sky, ground = _PLACE_COLOURS[name]
    ramp = (np.arange(height) / (height - 1))[:, None, None]
    canvas = np.asarray(sky) * (1.0 - ramp) + np.asarray(ground) * ramp + np.zeros((height, width, 3))
    canvas += 9.0 * value_noise(rng, height, width, 5)[..., None] + 5.0 * value_noise(rng, height, width, 24)[..., None]
    _PLACES[name](Pen.on(canvas), rng, height, width)
    return canvas


def _long(pen: Pen, colour: Colour) -> None:
    dark = _shade(colour, 0.8)
    for x in (-24, -14, 14, 24):
        pen.stroke((x, 10), (x, 30), 4.2, dark if x in (-14, 24) else colour, outline=True)
    pen.stroke((-34, -4), (-46, -16), 3.2, colour, outline=True)
    pen.stroke((26, -6), (33, -16), 6.5, colour, outline=True)
    pen.ellipse(0, 0, 37, 20, colour, outline=True, light=0.14)


def _ball(pen: Pen, colour: Colour) -> None:
    for x in (-12, 12):
        pen.ellipse(x, 28, 9, 5, _shade(colour, 0.8), outline=True)
    pen.ellipse(0, 0, 30, 29, colour, outline=True, light=0.16)


def _tall(pen: Pen, colour: Colour) -> None:
    for x in (-9, 9):
        pen.ellipse(x, 35, 8, 4.5, _shade(colour, 0.8), outline=True)
    pen.stroke((-16, 22), (-28, 30), 3.5, colour, outline=True)
    pen.ellipse(0, 0, 21, 36, colour, outline=True, light=0.14)
    for x in (-19, 19):
        pen.stroke((x * 0.8, -12), (x * 1.2, 8), 4.0, _shade(colour, 0.88), outline=True)


def _bear(pen: Pen, colour: Colour) -> None:
    for x in (-10, 10):
        pen.ellipse(x, -10, 5.5, 5.5, colour, outline=True)
        pen.ellipse(x, -10, 2.8, 2.8, _shade(colour, 0.6))
    pen.ellipse(0, 0, 14, 13, colour, outline=True)
    pen.ellipse(0, 5, 7, 5.5, WHITE)
    pen.ellipse(0, 2.5, 3.2, 2.2, INK)
    _eyes(pen, 5.5, -3, 1.7)


def _duck(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 12.5, 12.5, colour, outline=True)
    pen.ellipse(15, 3, 9.5, 4.2, ORANGE, outline=True)
    pen.stroke((9, 3), (22, 3.4), 0.6, _shade(ORANGE, 0.6))
    pen.ellipse(3.5, -3.5, 3.2, 3.2, WHITE)
    pen.ellipse(4.4, -3.5, 1.7, 1.7, INK)


def _fox(pen: Pen, colour: Colour) -> None:
    for side in (-1, 1):
        ear = [(side * 2.0, -8.0), (side * 13.0, -22.0), (side * 14.5, -3.0)]
        inner = [(side * 6.0, -9.0), (side * 12.0, -17.0), (side * 12.5, -7.0)]
        pen.polygon(ear if side > 0 else ear[::-1], colour, outline=True)
        pen.polygon(inner if side > 0 else inner[::-1], INK)
    pen.polygon([(-15, -6), (-6, -10), (6, -10), (15, -6), (13, 3), (0, 17), (-13, 3)], colour, outline=True)
    for side in (-1, 1):
        cheek = [(side * 13.5, 0.0), (side * 11.5, 4.0), (side * 1.0, 15.0), (side * 3.0, 4.0)]
        pen.polygon(cheek if side > 0 else cheek[::-1], WHITE)
    pen.ellipse(0, 15, 2.8, 2.4, INK)
    _eyes(pen, 5.5, -2, 1.8)


def _frog(pen: Pen, colour: Colour) -> None:
    for x in (-9, 9):
        pen.ellipse(x, -9, 6, 6, colour, outline=True)
    pen.ellipse(0, 1, 18, 11, colour, outline=True)
    for x in (-9, 9):
        pen.ellipse(x, -9, 4, 4, WHITE)
        pen.ellipse(x, -9, 1.2, 3.2, INK)
    pen.stroke((-12, 4), (0, 7), 1.0, INK)
    pen.stroke((0, 7), (12, 4), 1.0, INK)


def _owl(pen: Pen, colour: Colour) -> None:
    for side in (-1, 1):
        tuft = [(side * 4.0, -11.0), (side * 13.0, -20.0), (side * 13.0, -6.0)]
        pen.polygon(tuft if side > 0 else tuft[::-1], _shade(colour, 0.8), outline=True)
    pen.ellipse(0, 0, 15, 14, colour, outline=True)
    for x in (-6.3, 6.3):
        pen.ellipse(x, -1, 6.6, 6.6, (248, 214, 92), outline=True)
        pen.ellipse(x, -1, 3.2, 3.2, INK)
    pen.polygon([(-3, 4), (3, 4), (0, 10)], ORANGE)


def _rabbit(pen: Pen, colour: Colour) -> None:
    for x in (-5.0, 5.0):
        pen.stroke((x, -8), (x * 1.7, -25), 4.2, colour, outline=True)
        pen.stroke((x * 1.1, -10), (x * 1.65, -24), 1.7, (240, 176, 182))
    pen.ellipse(0, 0, 12.5, 12, colour, outline=True)
    pen.ellipse(0, 5, 6.5, 4.8, WHITE)
    pen.polygon([(-1.7, 6.5), (1.7, 6.5), (1.7, 11.5), (-1.7, 11.5)], (255, 255, 255), outline=True)
    pen.ellipse(0, 2.6, 2.2, 1.7, (230, 110, 130))
    _eyes(pen, 5.0, -3, 1.8)


def _eyes(pen: Pen, x: float, y: float, radius: float) -> None:
    for side in (-x, x):
        pen.ellipse(side, y, radius, radius * 1.15, INK)
        pen.ellipse(side + 0.5, y - 0.6, radius * 0.35, radius * 0.35, WHITE)


def _water(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(26):
        x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, 16)
        pen.stroke((x, y), (x + length, y), 0.9, (150, 200, 226))


def _marsh(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(9):
        x, y, size = rng.uniform(0, width), rng.uniform(height * 0.3, height), rng.uniform(7, 14)
        pen.ellipse(x, y, size, size * 0.4, (86, 140, 84), outline=True)
    for _ in range(12):
        x, y = rng.uniform(0, width), rng.uniform(height * 0.15, height * 0.6)
        pen.stroke((x, y), (x + rng.uniform(-4, 4), y - rng.uniform(14, 26)), 0.9, (70, 104, 62))


def _night(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(5):
        x, radius = rng.uniform(0, width), rng.uniform(3, 7)
        pen.stroke((x, -10), (x + rng.uniform(-6, 6), height), radius, (34, 38, 56))
    for _ in range(30):
        pen.ellipse(rng.uniform(0, width), rng.uniform(0, height * 0.6), 0.9, 0.9, (232, 226, 180))


def _rocks(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(11):
        x, y, size = rng.uniform(0, width), rng.uniform(height * 0.25, height), rng.uniform(4, 12)
        grey = rng.uniform(120, 160)
        pen.ellipse(x, y, size, size * 0.62, (grey, grey * 0.96, grey * 0.9), outline=True, light=0.2)


def _snow(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for row in range(3):
        y, x = height * (0.55 + 0.22 * row), rng.uniform(0, width)
        pen.ellipse(x, y + 40, width * 0.8, 44, (226 + 8 * row, 234 + 6 * row, 246))
    for _ in range(34):
        pen.ellipse(rng.uniform(0, width), rng.uniform(0, height), 1.3, 1.3, (252, 253, 255))


def _meadow(pen: Pen, rng: np.random.Generator, height: int, width: int) -> None:
    for _ in range(34):
        x, y = rng.uniform(0, width), rng.uniform(height * 0.2, height)
        pen.stroke((x, y), (x + rng.uniform(-3, 3), y - rng.uniform(4, 9)), 0.8, (84, 146, 66))
    for _ in range(9):
        x, y = rng.uniform(0, width), rng.uniform(height * 0.35, height)
        colour: Colour = (236, 92, 112) if rng.random() < 0.5 else (246, 220, 96)
        pen.ellipse(x, y, 2.0, 2.0, colour)


def _shade(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


_BODIES: dict[str, Callable[[Pen, Colour], None]] = {"long": _long, "ball": _ball, "tall": _tall}
_HEADS: dict[str, Callable[[Pen, Colour], None]] = {
    "bear": _bear,
    "duck": _duck,
    "fox": _fox,
    "frog": _frog,
    "owl": _owl,
    "rabbit": _rabbit,
}
_PLACES: dict[str, Callable[[Pen, np.random.Generator, int, int], None]] = {
    "rocks": _rocks,
    "water": _water,
    "snow": _snow,
    "marsh": _marsh,
    "night": _night,
    "meadow": _meadow,
}
_PLACE_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "rocks": ((222, 196, 156), (196, 164, 120)),
    "water": ((124, 178, 214), (62, 118, 170)),
    "snow": ((192, 212, 234), (228, 236, 246)),
    "marsh": ((150, 186, 170), (92, 132, 108)),
    "night": ((38, 44, 78), (66, 68, 98)),
    "meadow": ((178, 214, 150), (122, 178, 92)),
}
