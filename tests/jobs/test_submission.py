"""The submission to VOC's test server: what is in the archive, and each error by the image id."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import Storage
from jobs.importers.voc import VOC_CLASSES
from jobs.predict import PredictSettings
from jobs.submission import _settings_of_run, image_rows, read_ids, voc_lut, voc_palette, write_submission
from subcat_core.backbones import BackboneSettings
from subcat_core.segmenter import SegmenterSettings, build_segmenter
from tests.jobs.conftest import call_cli

IDS = ["2008_000006", "2008_000001", "2008_000011"]
SIZES = {"2008_000006": (20, 30), "2008_000001": (33, 21), "2008_000011": (8, 8)}


@pytest.fixture
def voc(tmp_path: Path, rng: np.random.Generator) -> Path:
    """test.txt, images/<id>.jpg, and masks/<id>.png with all of VOC's values."""
    (tmp_path / "test.txt").write_text("".join(f"{image_id}\n" for image_id in IDS))
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for image_id, size in SIZES.items():
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{image_id}.jpg")
        save_mask(tmp_path, image_id, np.resize(np.arange(21, dtype=np.uint8), size))
    return tmp_path


def save_mask(folder: Path, image_id: str, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(folder / "masks" / f"{image_id}.png")


def write(folder: Path, classes: tuple[str, ...] = VOC_CLASSES) -> bytes:
    rows = image_rows(read_ids(str(folder / "test.txt")), Storage(str(folder / "images")))
    uri = write_submission(rows, Storage(str(folder / "masks")), Storage(str(folder / "out")), lut=voc_lut(classes))
    assert uri == str(folder / "out/results.tgz")
    return Path(uri).read_bytes()


def masks_in(archive: bytes) -> dict[str, Image.Image]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
        return {entry.name: Image.open(io.BytesIO(packed.extractfile(entry).read())) for entry in packed}  # type: ignore[union-attr]


def test_the_archive_is_what_the_server_wants(voc: Path) -> None:
    data = write(voc)
    masks = masks_in(data)
    assert list(masks) == [f"results/VOC2012/Segmentation/comp6_test_cls/{image_id}.png" for image_id in IDS]
    for image_id, mask in zip(IDS, masks.values(), strict=True):
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), np.resize(np.arange(21), SIZES[image_id]))
    assert write(voc) == data


def test_the_palette_is_vocs() -> None:
    palette = voc_palette()
    colours = {index: tuple(palette[3 * index : 3 * index + 3]) for index in (0, 1, 2, 15, 20, 255)}
    assert len(palette) == 768
    assert colours == {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }


def test_a_few_classes_take_the_values_of_their_names(voc: Path) -> None:
    for image_id, size in SIZES.items():
        save_mask(voc, image_id, np.resize(np.array([0, 1, 2], np.uint8), size))
    mask = np.asarray(
        masks_in(write(voc, ("dog", "aeroplane")))[f"results/VOC2012/Segmentation/comp6_test_cls/{IDS[0]}.png"]
    )
    np.testing.assert_array_equal(mask, np.resize([0, 12, 1], SIZES[IDS[0]]))
    with pytest.raises(ValueError, match="unknown class 'gland'"):
        voc_lut(("dog", "gland"))


def test_what_is_missing_or_wrong_is_named_by_its_id(voc: Path) -> None:
    save_mask(voc, IDS[0], np.zeros((20, 31), np.uint8))
    save_mask(voc, IDS[1], np.full(SIZES[IDS[1]], 21, np.uint8))
    (voc / "images" / f"{IDS[2]}.jpg").unlink()
    with pytest.raises(ValueError, match="3 of 3 masks cannot be submitted") as error:
        write(voc)
    told = str(error.value)
    assert f"{IDS[0]}: the mask is 20 x 31 px, its image 20 x 30 px" in told
    assert f"{IDS[1]}: mask values 21 are outside the class table (it has 0..20)" in told
    assert f"{IDS[2]}.jpg" in told
    save_mask(voc, IDS[1], np.full(SIZES[IDS[1]], 255, np.uint8))
    with pytest.raises(ValueError, match=rf"{IDS[1]}: mask values 255 are outside"):
        write(voc)
    (voc / "masks" / f"{IDS[1]}.png").unlink()
    with pytest.raises(ValueError, match=rf"no mask for 1 of 3 ids \({IDS[1]}\)"):
        write(voc)
    assert not (voc / "out").exists()


def test_lists_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no id"):
        read_ids(str(path))
    path.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="holds a twice"):
        read_ids(str(path))


def test_the_command_packs_masks_that_are_there(
    voc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submission", str(voc / "test.txt"), "--images", str(voc / "images"), "--output", str(voc / "out")]
    assert call_cli(monkeypatch, *arguments) == 2
    assert "--model" in capsys.readouterr().err
    assert call_cli(monkeypatch, *arguments, "--predictions", str(voc / "masks"), "--comp5") == 0
    assert str(voc / "out/results.tgz") in capsys.readouterr().out
    names = list(masks_in((voc / "out/results.tgz").read_bytes()))
    assert names == [f"results/VOC2012/Segmentation/comp5_test_cls/{image_id}.png" for image_id in IDS]


def test_the_command_makes_the_masks_with_a_model(
    voc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SegmenterSettings(backbone=BackboneSettings(name="torchvision:resnet18", weights="none"))
    torch.manual_seed(0)
    model, _ = build_segmenter(settings, 2)
    folder = Storage(str(voc / "segmenter"))
    folder.write_json(
        "segmenter.json", {"model": settings.model_dump(mode="json"), "classes": ["cat", "dog"], "base_px": None}
    )
    torch.save(model.state_dict(), voc / "segmenter" / "model.pt")
    arguments = [str(voc / "test.txt"), "--images", str(voc / "images"), "--output", str(voc / "out")]
    assert call_cli(monkeypatch, "submission", *arguments, "--model", folder.root) == 0
    assert "results.tgz" in capsys.readouterr().out
    masks = masks_in((voc / "out/results.tgz").read_bytes())
    assert [mask.size for mask in masks.values()] == [SIZES[image_id][::-1] for image_id in IDS]
    for mask in masks.values():
        assert set(np.unique(np.asarray(mask))) <= {0, 8, 12}
    folder.write_json("segmenter.json", {**folder.read_json("segmenter.json"), "classes": ["cat", "gland"]})
    assert call_cli(monkeypatch, "submission", *arguments, "--model", folder.root) == 2
    assert "unknown class 'gland'" in capsys.readouterr().err


def test_a_model_in_its_run_predicts_as_the_run_did(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    model = Storage(run.uri("segmenter"))
    assert _settings_of_run(model) == PredictSettings()
    run.write_json("config.json", {"predict": PredictSettings(scales=(1.0, 0.5), flip=False).model_dump(mode="json")})
    assert _settings_of_run(model) == PredictSettings(scales=(1.0, 0.5), flip=False)


def test_options_that_would_do_nothing_are_refused(
    voc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submission", str(voc / "test.txt"), "--images", str(voc / "images"), "--output", str(voc / "out")]
    assert call_cli(monkeypatch, *arguments, "--predictions", str(voc / "masks"), "--set", "predict.flip=false") == 2
    assert "--set with --config" in capsys.readouterr().err
