"""report: a fabricated output folder, whole and in pieces, with and without ground truth."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker, TrackingSettings
from jobs import report
from jobs.context import StageContext
from jobs.manifest import open_manifest
from jobs.report import ReportSettings
from jobs.report_charts import Curve, curve_chart, sparkline, stacked_bar
from jobs.report_gallery import nearest_rows
from jobs.report_page import duration
from jobs.report_pictures import Candidate, choose, image_iou
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import encode_mask
from subcat_core.overlays import to_png

CLASSES = ClassTable(("heron", "tram", "kettle", "dune & sea"))
NUM_CLUSTERS = 3
ROUNDS = 2
SHARDS = (("part-00000", "train"), ("part-00001", "train"), ("part-00002", "val"))
ROWS_PER_SHARD = 10
SMALL = ReportSettings(num_examples=9, num_worst=3, panel_px=160)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What the report needs of an experiment."""

    name: str = "fabricated <run>"
    rounds: int = ROUNDS
    output: str = ""
    report: ReportSettings = SMALL

    def flattened(self) -> dict[str, str]:
        return {
            "name": self.name,
            "rounds": "2",
            "classifier.optimiser.epochs": "8",
            "prepare.uri": "s3://me:word@bucket/x",
        }


def fabricate(root: Path, *, with_truth: bool = True) -> Storage:
    """An output folder as a finished run of four classes leaves it, with shapes on gradients as its images."""
    storage = Storage(str(root / "out"))
    rng = np.random.default_rng(3)
    entries = []
    for name, split in SHARDS:
        rows = [
            _row(root, f"{split}_{name[-1]}_{index:02d}", split, index, rng, with_truth)
            for index in range(ROWS_PER_SHARD)
        ]
        storage.write_table(
            f"manifest/{name}.parquet", pa.Table.from_pylist([row for row, _ in rows], schemas.MANIFEST)
        )
        entries.append(
            {"name": name, "split": split, "num_rows": len(rows), "num_masks": len(rows) if with_truth else 0}
        )
        _write_shard(storage, name, split, rows, rng)
    storage.write_json("manifest/shards.json", entries)
    storage.write_bytes("manifest/classes.json", CLASSES.to_json().encode())
    bad = [{"image_id": "train_0_99", "uri": "/x/broken.jpg", "stage": "prepare", "reason": "truncated <JPEG>"}]
    storage.write_table("manifest/quarantine.parquet", pa.Table.from_pylist(bad, schemas.QUARANTINE))
    _write_results(storage, rng, with_truth)
    return storage


def _row(
    root: Path, image_id: str, split: str, index: int, rng: np.random.Generator, with_truth: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """A manifest row and its true mask; image and mask are written as PNG."""
    height, width = (120, 160) if index % 3 else (150, 110)
    labels = [index % 4] if index % 5 else sorted({index % 4, (index + 1) % 4})
    y, x = np.mgrid[:height, :width]
    image = np.stack([60 + y, 90 + x // 2, 150 - y // 2], -1) + rng.normal(0, 9, (height, width, 3))
    truth = np.zeros((height, width), np.uint8)
    for place, label in enumerate(labels):
        centre = (0.35 + 0.3 * place) * width + 8 * rng.random(), (0.55 - 0.15 * place) * height
        inside = ((x - centre[0]) / (0.2 * width)) ** 2 + ((y - centre[1]) / (0.3 * height)) ** 2 < 1
        truth[inside] = label + 1
        image[inside] = np.array([200, 60 + 45 * label, 70 + 30 * label]) + rng.normal(0, 14, (int(inside.sum()), 3))
    (root / "pictures").mkdir(exist_ok=True)
    uri, mask_uri = root / "pictures" / f"{image_id}.png", root / "pictures" / f"{image_id}_mask.png"
    uri.write_bytes(to_png(np.clip(image, 0, 255).astype(np.uint8)))
    mask_uri.write_bytes(encode_mask(truth, CLASSES.flat_palette()))
    row = {"image_id": image_id, "uri": str(uri), "height_px": height, "width_px": width, "split": split}
    return {**row, "labels": labels, "mask_uri": str(mask_uri) if with_truth else None}, truth


def _write_shard(
    storage: Storage, name: str, split: str, rows: list[tuple[dict[str, Any], np.ndarray]], rng: np.random.Generator
) -> None:
    for round_index in range(ROUNDS + 1):
        cams = [_cam_row(row, truth, round_index, rng) for row, truth in rows]
        storage.write_table(f"rounds/{round_index:02d}/cams/{name}.parquet", pa.Table.from_pylist(cams, schemas.CAMS))
        if split == "train" and round_index < ROUNDS:
            subs = [
                {
                    "image_id": row["image_id"],
                    "labels": row["labels"],
                    "cluster_ids": [int(rng.integers(NUM_CLUSTERS)) for _ in row["labels"]],
                    "distances": [float(rng.random()) for _ in row["labels"]],
                }
                for row, _ in rows
            ]
            table = pa.Table.from_pylist(subs, schemas.SUBCATEGORIES)
            storage.write_table(f"rounds/{round_index:02d}/subcategories/{name}.parquet", table)
    kind = "pseudo_masks" if split == "train" else "predictions"
    made = []
    for index, (row, truth) in enumerate(rows):
        mask = np.roll(truth, 3 * index, axis=1)
        if kind == "pseudo_masks":
            mask[(np.roll(mask, 4, axis=1) != mask)] = 255
        uri = f"{kind}/png/{row['image_id']}.png"
        storage.write_bytes(uri, encode_mask(mask, CLASSES.flat_palette()))
        ids = [label + 1 for label in row["labels"]]
        values = {"class_ids": ids, "coverage_frac": 0.2, "ignore_frac": 0.03, "confidence": 0.95 - 0.02 * index}
        made.append({"image_id": row["image_id"], "mask_uri": storage.uri(uri), **values})
    storage.write_table(f"{kind}/{name}.parquet", pa.Table.from_pylist(made, schemas.MASKS))


def _cam_row(row: dict[str, Any], truth: np.ndarray, round_index: int, rng: np.random.Generator) -> dict[str, Any]:
    cells = truth[::4, ::4]
    y, x = np.mgrid[: cells.shape[0], : cells.shape[1]]
    maps = []
    for label in row["labels"]:
        rows, columns = np.nonzero(cells == label + 1)
        spread = (3.0 + 2.5 * round_index) ** 2
        distance = (y - rows.mean()) ** 2 + (x - columns.mean()) ** 2 if len(rows) else y * 1.0
        maps.append(np.clip(np.exp(-distance / (2 * spread)) + 0.04 * rng.random(cells.shape), 0, 1))
    values = np.stack(maps).astype(np.float16)
    sizes = {"cam_height": cells.shape[0], "cam_width": cells.shape[1]}
    return {"image_id": row["image_id"], "class_indices": row["labels"], **sizes, "cam": values.ravel()}


def _write_results(storage: Storage, rng: np.random.Generator, with_truth: bool) -> None:
    thresholds = [round(step / 40, 3) for step in range(40)]
    for index in range(ROUNDS + 1):
        folder = f"rounds/{index:02d}"
        curve = [0.52 * np.exp(-(((t - 0.22 - 0.02 * index) / 0.33) ** 2)) + 0.03 * index for t in thresholds]
        splits = {s: _sweep(thresholds, curve) for s in ("train", "val")} if with_truth else {}
        protocol = {
            "masks": "CAM against annotated masks",
            "tags": "used",
            "crf": "no",
            "scales": [1.0, 0.5],
            "flip": True,
        }
        storage.write_json(f"{folder}/cams/scores.json", {"protocol": protocol, "splits": splits})
        history = [{"epoch": epoch, "loss": 2.0 * 0.7**epoch + 0.05 * rng.random()} for epoch in range(1, 9)]
        metrics = {"map": 0.81 + 0.03 * index, **{f"ap/{c}": 0.7 + 0.05 * c for c in range(4)}}
        storage.write_json(f"{folder}/classifier/result.json", {"metrics": metrics, "history": history})
        _marker(storage, f"{folder}/classifier", 61.5 + 9 * index, 20, images_per_s=55.2)
        _marker(storage, f"{folder}/cams", 14.2, 30, images_per_s=31.0)
        if index < ROUNDS:
            counts = rng.integers(1, 9, (4, NUM_CLUSTERS)).tolist()
            result = {"num_clusters": NUM_CLUSTERS, "counts": counts, "num_passes": 7}
            result |= {"inertia": [1043.2, 87.1, 5.5, 0.25], "balance": [0.97, 0.81, 1.0, 0.6]}
            storage.write_json(f"{folder}/subcategories/result.json", result)
            _marker(storage, f"{folder}/features", 5.1, 20, images_per_s=88.0)
            _marker(storage, f"{folder}/subcategories", 1.4, None, num_passes=7)
    score = {"num_images": 10, "miou": 0.583, "iou": [0.83, 0.61, None, 0.49, 0.4], "pixel_accuracy": 0.87}
    empty = {"num_images": 10, "miou": 0.16, "iou": [0.8, 0.0, 0.0, 0.0, 0.0], "pixel_accuracy": 0.8}
    protocol = {
        "masks": "the manifest's mask_uri",
        "tags": "not used",
        "crf": {"iterations": 10, "spatial_weight": 3.0},
    }
    pseudo = {
        "protocol": {**protocol, "tags": "used", "base_px": None},
        "splits": {"train": score} if with_truth else {},
    }
    storage.write_json("pseudo_masks/scores.json", pseudo)
    baselines = {"all_background": {"val": empty} if with_truth else {}}
    splits = {"val": {**score, "miou": 0.612}} if with_truth else {}
    storage.write_json("evaluation/scores.json", {"protocol": protocol, "splits": splits, "baselines": baselines})
    history = [{"epoch": epoch, "loss": 1.5 * 0.8**epoch} for epoch in range(1, 13)]
    storage.write_json("segmenter/result.json", {"metrics": {}, "history": history})
    _marker(storage, "manifest", 2.2, 30, stage="prepare", fingerprint="0" * 32)
    bad = [{"image_id": "train_1_04", "uri": "/x/train_1_04.png", "reason": "no CAM was made for this image"}]
    _marker(storage, "pseudo_masks", 20.3, 20, bad=bad, num_bad=1)
    for folder, seconds in (("segmenter", 183.0), ("predictions", 8.0), ("evaluation", 1.1)):
        _marker(storage, folder, seconds, 10, images_per_s=12.5)


def _sweep(thresholds: list[float], curve: list[float]) -> dict[str, Any]:
    best = int(np.argmax(curve))
    rest = {"num_images": 10, "iou": [0.8, 0.5, 0.4, None, 0.3], "pixel_accuracy": 0.8}
    return {
        "num_images": 10,
        "thresholds": thresholds,
        "miou": [float(value) for value in curve],
        "fixed": {"threshold": 0.15, "miou": curve[6], **rest},
        "best": {"threshold": thresholds[best], "miou": curve[best], **rest},
    }


def _marker(
    storage: Storage, folder: str, seconds: float, num_images: int | None, *, stage: str = "", **stats: Any
) -> None:
    memory = {"peak_rss_bytes": 1_400_000_000, "driver_rss_bytes": 700_000_000}
    counted = {} if num_images is None else {"num_images": num_images}
    record = {
        "finished_at": "2026-01-02T03:04:05+00:00",
        "code_version": "0123456789abcdef",
        "inputs": {"stage": stage},
    }
    storage.write_json(f"{folder}/marker.json", {**record, "stats": {"seconds": seconds, **counted, **memory, **stats}})


class _Checker(HTMLParser):
    """Fails on tags that do not close in order; collects what a browser would load."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> _Checker:
    """Parse; no script, nothing from elsewhere, every tag closed."""
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(value.startswith(("data:image/", "#")) for value in checker.loaded)
    assert "url(" not in page
    assert "@import" not in page
    return checker


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return fabricate(tmp_path_factory.mktemp("report"))


def make(storage: Storage, experiment: Any = None, command: str = "subcat run x.toml") -> str:
    uri = report.write_report(storage, experiment or StandIn(), command=command)
    return Path(uri).read_text(encoding="utf-8")


def test_the_whole_page(finished: Storage) -> None:
    page = make(finished, command="subcat run 'a & b.toml' --set x=s3://key:s3cret@b/c")
    text = " ".join(checked(page).text)
    for expected in (
        "fabricated <run>",
        "0.612",
        "Segmenter mIoU",
        "dune & sea",
        "CAM, round 2",
        "pseudo mask",
        "prediction",
        "ground truth",
        "among the worst",
        "truncated <JPEG>",
        "no CAM was made for this image",
        "subcat run 'a & b.toml' --set x=s3://b/c",
        "classifier.optimiser.epochs",
        "All background",
        "after the rounds",
        "Round 1: images nearest to each centroid",
    ):
        assert expected in text, expected
    assert "s3cret" not in page
    assert "me:word" not in page
    assert len(re.findall(r'<article class="example">', page)) == 9
    assert len(page) < 3_000_000


def test_the_same_page_every_time(finished: Storage) -> None:
    assert make(finished) == make(finished)


def test_without_ground_truth(tmp_path: Path) -> None:
    page = make(fabricate(tmp_path, with_truth=False))
    text = " ".join(checked(page).text)
    assert "No image of this run has ground truth" in text
    assert "confidence 0.9" in text
    assert "Not there for any of them: ground truth." in text
    assert "<polyline" in page  # losses are there all the same


def test_half_a_run(tmp_path: Path) -> None:
    storage = fabricate(tmp_path)
    for folder in ("rounds/02", "pseudo_masks", "segmenter", "predictions", "evaluation"):
        storage.delete_tree(folder)
    text = " ".join(checked(make(storage)).text)
    assert "No mask has been made yet" in text
    assert "round 1" in text
    storage.delete_tree("rounds")
    storage.delete("manifest/quarantine.parquet")
    text = " ".join(checked(make(storage)).text)
    assert "This run has no sub-categories" in text
    assert "Every image and mask could be read." in text
    with pytest.raises(ValueError, match="no manifest here"):
        make(Storage(str(tmp_path / "nothing")))


def test_a_picture_that_is_gone_or_broken_is_left_out(tmp_path: Path) -> None:
    storage = fabricate(tmp_path)
    pictures = sorted((tmp_path / "pictures").glob("train_0_*[0-9].png"))
    pictures[0].unlink()
    pictures[1].write_bytes(b"\x89PNG broken")
    storage.delete("rounds/00/cams/part-00000.parquet")
    page = make(storage, dataclasses.replace(StandIn(), report=ReportSettings(num_examples=30, num_worst=30)))
    checked(page)
    shown = re.findall(r"<p><code>(\w+)</code>", page)
    assert "train_0_00" not in shown
    assert "train_0_01" not in shown
    assert len(shown) == 28


def test_run_writes_logs_and_says_where(tmp_path: Path) -> None:
    import mlflow

    storage = fabricate(tmp_path)
    with Tracker(TrackingSettings(), storage, "report test") as tracker:
        experiment: Any = StandIn()
        uri = report.run(StageContext(experiment, storage, Progress(), tracker, "subcat run"))
        run_id = tracker.run_id
    assert uri == storage.uri("report/index.html")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = client.get_run(str(run_id)).data.metrics
    assert metrics["final/segmenter_miou_val"] == 0.612
    assert metrics["final/pseudo_mask_miou_train"] == 0.583
    assert metrics["total/seconds"] == pytest.approx(
        2.2 + 20.3 + 183 + 8 + 1.1 + 61.5 + 70.5 + 79.5 + 3 * 14.2 + 2 * 6.5
    )
    child = storage.read_json("tracking.json")["runs"]["report"]
    paths = {item.path for item in client.list_artifacts(child)}
    assert paths == {"report.html", "images"}


def test_choice_is_medians_by_class_then_the_worst() -> None:
    def candidate(name: str, label: int, score: float, is_iou: bool = True) -> Candidate:
        return Candidate("pseudo_masks", "part-00000", name, "", (label,), None, "", score, is_iou)

    candidates = [candidate(f"a{i}", 0, i / 10) for i in range(1, 6)] + [
        candidate(f"b{i}", 1, i / 10) for i in range(4, 9)
    ]
    chosen = [(c.image_id, worst) for c, worst in choose(candidates, 4, 2, 2)]
    # worst are a1, a2; what is left of class 0 is a3 a4 a5, of class 1 b4 b5 b6 b7 b8
    assert chosen == [("a4", False), ("b6", False), ("a1", True), ("a2", True)]
    assert choose(list(reversed(candidates)), 4, 2, 2) == choose(candidates, 4, 2, 2)
    assert len(choose(candidates, 50, 2, 2)) == 10
    unscored = [candidate("c", 0, 0.01, is_iou=False), candidate("d", 0, 0.5)]
    assert [c.image_id for c, _ in choose(unscored, 1, 1, 2)] == ["d"]
    assert choose([], 4, 2, 2) == []


def test_image_iou_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0, 255, 2]], np.uint8)
    made = np.array([[1, 0, 1, 0, 1, 255]], np.uint8)
    # class 1: 1 of 3; class 2: 0 of 1; the pixel of 255 in the truth is skipped
    assert image_iou(made, truth) == pytest.approx((1 / 3 + 0) / 2)
    assert image_iou(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8)) == 1.0
    with pytest.raises(ValueError, match="image's size"):
        image_iou(made, truth.T)


def test_nearest_rows_against_a_plain_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    storage = Storage(str(tmp_path))
    plain: dict[tuple[int, int], list[tuple[float, str, str]]] = {}
    for name in ("part-00000", "part-00001", "part-00002"):
        rows = []
        for index in range(40):
            labels = sorted(rng.choice(5, rng.integers(0, 4), replace=False).tolist())
            clusters = [int(rng.integers(3)) for _ in labels]
            distances = [float(np.float32(rng.integers(6) / 8)) for _ in labels]
            rows.append(
                {"image_id": f"{name}-{index:02d}", "labels": labels, "cluster_ids": clusters, "distances": distances}
            )
            if name != "part-00002":
                for label, cluster, distance in zip(labels, clusters, distances, strict=True):
                    plain.setdefault((label, cluster), []).append((distance, f"{name}-{index:02d}", name))
        table = pa.Table.from_pylist(rows, schemas.SUBCATEGORIES)
        storage.write_table(f"rounds/01/subcategories/{name}.parquet", table)
    found, num_seen = nearest_rows(storage, 1, ["part-00000", "part-00009", "part-00001", "part-00002"], 4, 80)
    assert num_seen == 80
    assert found == {key: sorted(rows)[:4] for key, rows in plain.items()}


def test_galleries_shrink_to_the_limit(finished: Storage) -> None:
    settings = ReportSettings(num_examples=0, max_tiles=12)
    page = make(finished, dataclasses.replace(StandIn(), report=settings))
    assert page.count("<img") <= 12
    assert "No gallery for round 0" in page


def test_charts() -> None:
    svg = curve_chart(
        [Curve("round 0", [0.0, 0.5, 0.9], [0.1, None, 0.3], 2)], across="threshold", up="mIoU", rule=0.15
    )
    assert svg.count("<polyline") == 1
    assert svg.count("<circle") == 1
    assert "round 0: 0.300 at 0.90" in svg
    assert curve_chart([Curve("x", [0.0], [None])], across="a", up="b") == ""
    assert sparkline([1.0], "x") == ""
    assert 'points="3.0,3.0 70.0,29.0 137.0,29.0"' in sparkline([2.0, 1.0, 1.0], "x")
    assert stacked_bar([0, 0], "x") == ""
    assert 'width="55.00"' in stacked_bar([1, 3], "x")


@pytest.mark.parametrize(("seconds", "text"), [(8.44, "8.4 s"), (432.9, "7 min 12 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_fabricated_manifest_is_a_manifest(finished: Storage) -> None:
    manifest = open_manifest(finished)
    assert manifest.num_rows("train") == 20
    assert manifest.shard_names("val") == ["part-00002"]


def test_classes_without_a_background(tmp_path: Path) -> None:
    """No threshold and no curve: the maps' argmax, and one baseline a class."""
    storage = fabricate(tmp_path)
    score = {"num_images": 10, "miou": 0.583, "iou": [None, 0.61, 0.5, 0.49, 0.4], "pixel_accuracy": 0.87}
    alone = {**score, "miou": 0.171}
    for index in range(ROUNDS + 1):
        name = f"rounds/{index:02d}/cams/scores.json"
        scores = storage.read_json(name)
        scores["splits"] = {split: {**score, "all_tram": alone} for split in ("train", "val")}
        storage.write_json(name, scores)
    scores = storage.read_json("evaluation/scores.json")
    scores["baselines"] = {"all_tram": {"val": alone}}
    storage.write_json("evaluation/scores.json", scores)
    text = " ".join(checked(make(storage)).text)
    assert "val, round 2, largest map" in text
    assert "All tram" in text
    assert "0.171" in text
    assert "mIoU by threshold" not in text
