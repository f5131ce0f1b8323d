"""The whole run on what real folders hold: odd formats, one pixel, a class of one image, all tags, a broken file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from jobs.config import parse_experiment
from jobs.execution import execute
from subcat_core.images import decode_image
from tests.jobs.conftest import draw_tiny, tiny_values


@pytest.fixture(scope="module")
def hard_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Storage]:
    """(folder of the images, output) of a finished run on hard data."""
    table = draw_tiny(tmp_path_factory.mktemp("hard") / "data")
    folder = table.parent
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 255, (40, 56, 3)).astype(np.uint8)
    Image.fromarray(colour[..., 0]).save(folder / "grey.png")
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(colour[..., 0].astype(np.uint16) << 8).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    Image.fromarray(colour).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(colour[:1, :1]).save(folder / "one_pixel.png")
    Image.fromarray(colour).save(folder / "all_tags.png")
    Image.fromarray(colour).save(folder / "whole.jpg")
    (folder / "broken.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:600])
    lines = table.read_text().splitlines()
    for name, labels in {
        "grey.png": "disc",
        "cmyk.jpg": "square",
        "deep.png": "disc",
        "turned.jpg": "square",
        "one_pixel.png": "disc",
        "all_tags.png": "disc;rare;square",  # and the only image of class rare
        "broken.jpg": "disc",
    }.items():
        lines.append(f"{name},{labels},train,")
    table.write_text("\n".join(lines) + "\n")
    values: dict[str, Any] = tiny_values(table, str(folder.parent / "out"))
    values["prepare"]["max_bad_frac"] = 0.1
    values["kmeans"]["num_clusters"] = 4
    execute(parse_experiment(values))
    return folder, Storage(values["output"])


def test_every_readable_image_gets_a_mask_of_its_own_size(hard_run: tuple[Path, Storage]) -> None:
    folder, output = hard_run
    for name in ("grey.png", "cmyk.jpg", "deep.png", "turned.jpg", "one_pixel.png", "all_tags.png"):
        image = decode_image((folder / name).read_bytes())
        stored = output.read_bytes(f"pseudo_masks/png/{Path(name).stem}.png")
        assert decode_image(stored).shape == image.shape, name
    assert decode_image((folder / "turned.jpg").read_bytes()).shape == (56, 40, 3)


def test_the_broken_image_is_quarantined_with_its_reason_and_told(hard_run: tuple[Path, Storage]) -> None:
    _, output = hard_run
    quarantined = output.read_table("manifest/quarantine.parquet").to_pylist()
    assert [row["image_id"] for row in quarantined] == ["broken"]
    assert "truncated" in quarantined[0]["reason"].lower()
    assert not output.exists("pseudo_masks/png/broken.png")
    assert "broken.jpg" in output.read_bytes("report/index.html").decode()


def test_a_class_of_one_image_has_one_sub_category(hard_run: tuple[Path, Storage]) -> None:
    _, output = hard_run
    assert output.read_json("rounds/00/subcategories/result.json")["counts"][1] == [1, 0, 0, 0]
