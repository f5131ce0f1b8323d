"""The embedded data set is the same everywhere, balanced as its docstring says, and importable."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.progress import Progress
from jobs import demo_dataset
from jobs.demo_dataset import (
    CLASSES,
    NUM_TRAIN,
    NUM_VAL,
    draw_demo_image,
    looks_of,
    plan_demo_dataset,
    stored_png,
    write_demo_dataset,
)
from jobs.demo_shapes import Pen
from jobs.validate import validate
from subcat_core.classes import ClassTable
from subcat_core.images import decode_image, decode_mask

# sha256 of the files. PNG files are stored without compression by our own writer, so neither zlib nor Pillow has a say;
# drawing uses only operations that IEEE 754 defines exactly.
DIGESTS = {
    "images/demo-0000.png": "696bcc33bd3ce044",
    "images/demo-0007.png": "1e4c7d536ea6587e",
    "masks/demo-0000.png": "e59c532f2528d17f",
    "labels.csv": "9a9249b127e4c691",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pictures; each is drawn from a seed of its own, so they are those of the whole set."""
    path = tmp_path_factory.mktemp("demo")
    write_demo_dataset(path, num_train=10, num_val=2)
    return path


def test_same_bytes_everywhere(folder: Path) -> None:
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in DIGESTS}
    assert found == DIGESTS


def test_plan_is_balanced() -> None:
    images = plan_demo_dataset()
    assert [image.split for image in images].count("train") == NUM_TRAIN
    assert len(images) == NUM_TRAIN + NUM_VAL
    assert sum(len(image.labels) >= 2 for image in images) * 3 == len(images)
    looks = [creature for image in images[:NUM_TRAIN] for creature in image.creatures]
    assert set(looks) == {(index, look) for index in range(len(CLASSES)) for look in looks_of(index)}
    counts = np.array([looks.count(creature) for creature in set(looks)])
    assert counts.min() >= 20
    assert counts.max() <= 45
    at_home = [image.place == demo_dataset.HOMES[image.creatures[0][0]] for image in images]
    assert 0.65 < np.mean(at_home) < 0.85


def test_every_look_serves_three_classes() -> None:
    looks = [look for index in range(len(CLASSES)) for look in looks_of(index)]
    assert sorted(looks) == sorted(list(range(6)) * 3)


def test_masks_hold_the_tags_and_leave_background() -> None:
    for index, plan in enumerate(plan_demo_dataset(num_train=12, num_val=0)):
        image, mask = draw_demo_image(plan, np.random.default_rng([0, 1, index]))
        assert image.shape[:2] == mask.shape
        assert sorted(set(np.unique(mask)) - {0}) == [label + 1 for label in plan.labels]
        assert 0.08 < (mask > 0).mean() < 0.6


def test_another_seed_is_another_data_set() -> None:
    assert plan_demo_dataset(1) != plan_demo_dataset(0)


def test_files_are_read_back_and_import_without_a_problem(folder: Path) -> None:
    plan = plan_demo_dataset(num_train=10, num_val=2)[1]
    image, mask = draw_demo_image(plan, np.random.default_rng([0, 1, 1]))
    assert np.array_equal(decode_image((folder / f"images/{plan.image_id}.png").read_bytes()), image)
    stored = (folder / f"masks/{plan.image_id}.png").read_bytes()
    assert np.array_equal(decode_mask(stored, ClassTable(CLASSES).mask_lut()), mask)
    found = validate(str(folder / "labels.csv"), decode=True, progress=Progress(io.StringIO()))
    assert found == []


def test_a_whole_data_set_is_left_alone_and_a_half_one_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_demo_dataset(tmp_path, num_train=2, num_val=1)
    before = table.stat().st_mtime_ns
    monkeypatch.setattr(demo_dataset, "draw_demo_image", None)
    assert write_demo_dataset(tmp_path, num_train=2, num_val=1) == table
    assert table.stat().st_mtime_ns == before
    monkeypatch.undo()
    write_demo_dataset(tmp_path, num_train=3, num_val=1)
    assert len(table.read_text().splitlines()) == 5


def test_stored_png_of_many_blocks_is_what_pillow_reads(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 255, (200, 230, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored_png(pixels)))), pixels)


def test_pen_draws_where_it_is_told() -> None:
    canvas = np.zeros((20, 40, 3))
    pen = Pen.on(canvas, centre=(10, 10), unit_px=2.0)
    pen.ellipse(0, 0, 3, 2, (100, 100, 100))
    inside = (np.arange(40)[None] + 0.5 - 10) ** 2 / 36 + (np.arange(20)[:, None] + 0.5 - 10) ** 2 / 16 <= 1
    assert np.array_equal(pen.covered, inside)
    assert canvas[10, 10].tolist() == [100, 100, 100]
    moved = Pen.on(canvas, centre=(30, 10), mirrored=True)
    moved.stroke((2, 0), (4, 0), 1.0, (9, 9, 9))
    assert np.flatnonzero(moved.covered.any(axis=0)).mean() + 0.5 == 27  # mirrored: to the left
    outside = Pen.on(canvas, centre=(500, 500))
    outside.polygon([(0, 0), (4, 0), (4, 4)], (9, 9, 9))
    assert not outside.covered.any()
