"""Prepare fills sizes, quarantines what cannot be used, goes on after a kill, and refuses broken lists at once."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.artifacts import ArtifactMismatch
from cluster.progress import Progress
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from cluster.tracking import Tracker, TrackingSettings
from jobs import prepare
from jobs.manifest import Manifest, open_manifest
from jobs.prepare import PrepareSettings
from subcat_core.classes import ClassTable
from subcat_core.images import encode_mask

CLASSES = ("cat", "dog")


@dataclasses.dataclass
class DataFolder:
    """Pictures with a table that lists them."""

    folder: Path
    lines: list[str] = dataclasses.field(default_factory=lambda: ["image,labels,split,mask"])

    def add(
        self, name: str, data: bytes | Image.Image, labels: str = "cat", split: str = "train", mask: Any = None
    ) -> None:
        (self.folder / name).write_bytes(_bytes(data))
        if mask is not None:
            (self.folder / f"mask-{name}").write_bytes(_bytes(mask))
        self.lines.append(f"{name},{labels},{split},{'' if mask is None else f'mask-{name}'}")

    def table(self) -> str:
        (self.folder / "labels.csv").write_text("\n".join(self.lines) + "\n")
        return str(self.folder / "labels.csv")


def _bytes(data: bytes | Image.Image) -> bytes:
    if isinstance(data, bytes):
        return data
    buffer = io.BytesIO()
    data.save(buffer, "JPEG" if data.mode == "CMYK" else "PNG")
    return buffer.getvalue()


def _mask(height: int, width: int, value: int = 1) -> bytes:
    return encode_mask(np.full((height, width), value, np.uint8), ClassTable(CLASSES).flat_palette())


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    (tmp_path / "data").mkdir()
    return DataFolder(tmp_path / "data")


def _run(
    data: DataFolder | str, output: Storage, num_actors: int = 0, **values: Any
) -> tuple[Manifest, dict[str, Any]]:
    table = data if isinstance(data, str) else data.table()
    source = {"kind": "table", "path": table, "classes": list(CLASSES)}
    settings = PrepareSettings.model_validate_json(json.dumps({"source": source, "rows_per_shard": 3, **values}))
    experiment = SimpleNamespace(prepare=settings, stream=StreamSettings(num_actors=num_actors))
    context: Any = SimpleNamespace(
        experiment=experiment,
        storage=output,
        progress=Progress(io.StringIO()),
        tracker=Tracker(TrackingSettings(enabled=False), output, "prepare"),
    )
    artifact = prepare.run(context)
    return open_manifest(output), artifact.stats()


def _fill(data: DataFolder, num_images: int = 7) -> None:
    for index in range(num_images):
        image = Image.new("RGB", (10 + index, 8), (index, 0, 0))
        split = "train" if index < num_images - 2 else "val"
        data.add(f"{index}.png", image, labels=CLASSES[index % 2], split=split, mask=_mask(8, 10 + index))


def test_sizes_splits_and_counts(data: DataFolder, storage_root: str) -> None:
    _fill(data)
    manifest, stats = _run(data, Storage(storage_root))
    rows = manifest.rows(None).to_pylist()
    assert [(row["image_id"], row["height_px"], row["width_px"]) for row in rows] == [
        (str(index), 8, 10 + index) for index in range(7)
    ]
    assert [(shard.split, shard.num_rows, shard.num_masks) for shard in manifest.shards] == [
        ("train", 3, 3),
        ("train", 2, 2),
        ("val", 2, 2),
    ]
    assert stats["splits"]["train"] == {"images": 5, "masks": 5, "classes": {"cat": 3, "dog": 2}}
    assert (stats["num_images"], stats["num_bad"], stats["warnings"]) == (7, 0, [])
    assert not manifest.folder.exists("raw")
    assert manifest.folder.read_table("quarantine.parquet").num_rows == 0


def test_through_ray_gives_the_same_manifest(data: DataFolder, tmp_path: Path, ray_cluster: None) -> None:
    _fill(data)
    here, _ = _run(data, Storage(str(tmp_path / "here")))
    there, _ = _run(data, Storage(str(tmp_path / "there")), num_actors=2)
    assert there.rows(None) == here.rows(None)
    assert there.fingerprint == here.fingerprint


def test_odd_but_sound_images_stay(data: DataFolder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = io.BytesIO()
    Image.new("RGB", (20, 10)).save(rotated, "JPEG", exif=exif)
    data.add("rotated.jpg", rotated.getvalue(), mask=_mask(20, 10))
    data.add("grey.png", Image.new("L", (5, 4)))
    data.add("cmyk.jpg", Image.new("CMYK", (5, 4)))
    data.add("deep.png", Image.fromarray(np.zeros((4, 5), np.uint16)))
    data.add("pixel.png", Image.new("RGB", (1, 1)), labels="cat;dog")
    manifest, _ = _run(data, Storage(str(tmp_path / "out")))
    sizes = {row["image_id"]: (row["height_px"], row["width_px"]) for row in manifest.rows("train").to_pylist()}
    assert sizes == {"rotated": (20, 10), "grey": (4, 5), "cmyk": (4, 5), "deep": (4, 5), "pixel": (1, 1)}


def test_bad_images_go_to_quarantine_with_their_reason(data: DataFolder, tmp_path: Path) -> None:
    _fill(data)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    data.add("cut.jpg", buffer.getvalue()[:600])
    data.add("html.jpg", b"<html>not found</html>")
    data.add("small-mask.png", Image.new("RGB", (8, 8)), mask=_mask(4, 8))
    grey = Image.open(io.BytesIO(_mask(8, 8))).convert("L")
    data.add("grey-mask.png", Image.new("RGB", (8, 8)), mask=grey)
    data.add("colour-mask.png", Image.new("RGB", (8, 8)), mask=grey.convert("RGB"))
    data.lines.append("gone.png,cat,train,")
    manifest, stats = _run(data, Storage(str(tmp_path / "out")), max_bad_frac=0.5)
    assert manifest.num_rows() == 7
    quarantine = {row["image_id"]: row for row in manifest.folder.read_table("quarantine.parquet").to_pylist()}
    expected = {
        "cut": "undecodable image: .*truncated",
        "html": "undecodable image: .*cannot be identified",
        "small-mask": "mask of another size: .*4 x 8 px, its image 8 x 8",
        "grey-mask": "mask values: .*read as grey",
        "colour-mask": "mask values: .*holds colours",
        "gone": "missing file: ",
    }
    assert set(quarantine) == set(expected)
    for image_id, pattern in expected.items():
        assert quarantine[image_id]["stage"] == "prepare"
        assert re.search(pattern, quarantine[image_id]["reason"])
    assert stats["num_bad"] == 6


@pytest.mark.parametrize("broken", ["uri", "mask_uri"])
def test_a_storage_that_fails_is_no_bad_image(data: DataFolder, broken: str) -> None:
    data.add("a.png", Image.new("RGB", (4, 4)))
    row = {"uri": str(data.folder / "a.png"), "mask_uri": None, broken: "/proc/self/mem"}  # EIO, as of a failing disk
    worker = prepare.CheckWorker(classes=ClassTable(CLASSES), mode="full")
    with pytest.raises(StorageError, match=r"^/proc/self/mem: cannot read: Input/output error$"):
        worker._size_or_problem(row)


def test_too_many_bad_images_fail_and_a_higher_limit_goes_on(data: DataFolder, tmp_path: Path) -> None:
    _fill(data)
    data.add("bad.png", b"no image")
    output = Storage(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"bad.png"):
        _run(data, output, max_bad_frac=0.05)
    assert not output.exists("manifest/marker.json")
    manifest, _ = _run(data, output, max_bad_frac=0.2)
    assert manifest.num_rows() == 7


def test_header_mode_reads_sizes_and_leaves_pixels(data: DataFolder, tmp_path: Path) -> None:
    _fill(data, 4)
    grey_mask = Image.open(io.BytesIO(_mask(8, 8))).convert("L")
    data.add("grey-mask.png", Image.new("RGB", (8, 8)), mask=grey_mask)
    manifest, _ = _run(data, Storage(str(tmp_path / "out")), decode="header")
    assert manifest.num_rows() == 5
    assert manifest.rows("train")["height_px"].to_pylist() == [8, 8, 8]


def test_all_problems_of_the_lists_at_once(data: DataFolder, tmp_path: Path) -> None:
    _fill(data)
    data.lines += ["0.png,cat,val,", "9.png,wolf,train,", "10.png,,train,"]
    with pytest.raises(ValueError, match=r"(?s)3 errors.*unknown class.*:10.*without a tag.*:11.*duplicate.*:9"):
        _run(data, Storage(str(tmp_path / "out")))


@pytest.mark.parametrize("bad", [b"no image", None])
def test_empty_split_is_an_error(data: DataFolder, tmp_path: Path, bad: bytes | None) -> None:
    """Empty in the lists, or emptied by quarantine."""
    data.add("a.png", Image.new("RGB", (8, 8)), split="val")
    if bad is not None:
        data.add("b.png", bad, split="train")
    with pytest.raises(ValueError, match="split 'train' has no image"):
        _run(data, Storage(str(tmp_path / "out")), max_bad_frac=1.0)


def test_class_without_images_is_a_warning(data: DataFolder, tmp_path: Path) -> None:
    data.add("a.png", Image.new("RGB", (8, 8)))
    _, stats = _run(data, Storage(str(tmp_path / "out")))
    assert len(stats["warnings"]) == 1
    assert "class 'dog' has no image" in stats["warnings"][0]


def test_finished_is_skipped_and_other_inputs_are_named(
    data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(data)
    output = Storage(str(tmp_path / "out"))
    before, _ = _run(data, output)
    monkeypatch.setattr(prepare, "map_shards", None)
    assert _run(data, output, max_bad_frac=0.3)[0] == before
    with pytest.raises(ArtifactMismatch, match=r"rows_per_shard: 3 -> 4"):
        _run(data, output, rows_per_shard=4)
    data.lines.pop()
    with pytest.raises(ArtifactMismatch, match=r"labels.csv"):
        _run(data, output)


def test_goes_on_after_a_kill_between_shards(data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(data)
    expected, _ = _run(data, Storage(str(tmp_path / "undisturbed")))
    output = Storage(str(tmp_path / "out"))
    calls: list[int] = []
    original: Callable[..., Any] = prepare.CheckWorker.__call__

    def stopped_at_second(self: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, inputs)

    monkeypatch.setattr(prepare.CheckWorker, "__call__", stopped_at_second)
    with pytest.raises(KeyboardInterrupt):
        _run(data, output)
    assert not output.exists("manifest/marker.json")
    manifest, _ = _run(data, output)
    assert len(calls) == 4  # the first shard was not read again
    assert manifest.rows(None) == expected.rows(None)
    assert manifest.fingerprint == expected.fingerprint
