"""Maps, masks and predictions of tiles come back as those of whole images, and are scored there, by the plain mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from cluster.artifacts import Artifact
from cluster.image_reading import BadRow
from jobs import choose_round, cut_tiles, evaluate, make_cams, make_pseudo_masks, predict
from jobs.cam_tables import read_cams
from jobs.context import StageContext
from jobs.manifest import Manifest
from jobs.predict import PredictSettings
from jobs.sample import sample_ids
from jobs.tile_images import TileScorer, by_image, classes_by_image, is_of_scored_image, spread_channels
from jobs.tile_masks import maps_of_image
from jobs.train_segmenter import load_segmenter
from jobs.training_masks import confidence_name, tile_mask_rows
from subcat_core.backbones import build_backbone
from subcat_core.cam import upsample_cam
from subcat_core.classes import IGNORE
from subcat_core.classifier import Classifier
from subcat_core.label_free import LabelFreeGrid
from subcat_core.metrics import ConfusionMatrix, ThresholdSweep
from subcat_core.pseudo_mask import PseudoMaskSettings, make_pseudo_mask
from subcat_core.segmenter import predict_mask
from subcat_core.windows import predict_windows
from tests.jobs.tile_runs import (
    SIZES,
    TILES,
    context_of,
    draw_glands,
    glas_values,
    prepared,
    random_classifier,
    random_segmenter,
    stored_model,
)

PLAIN = PseudoMaskSettings(crf=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_glands(tmp_path_factory.mktemp("glas") / "data")


@pytest.fixture(scope="module")
def made(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageContext, Manifest, Manifest, Artifact, Artifact]:
    """Context, images, tiles, CAMs and pseudo masks of a classifier that learned nothing."""
    output = str(tmp_path_factory.mktemp("run") / "out")
    context = context_of(glas_values(data, output, {**TILES, "segmenter_sees": "tiles"}))
    images = prepared(context)
    tiles = cut_tiles.run(context, images)
    classifier = random_classifier(context)
    cams = make_cams.run(context, tiles, 0, classifier, images)
    of_train = make_cams.run_train(context, tiles, 0, classifier)
    masks = make_pseudo_masks.run(context, images, of_train, context.experiment.pseudo_masks.mask, tiles=tiles)
    return context, images, tiles, cams, masks


def truth_of(data: Path, image_id: str) -> np.ndarray:
    return np.where(np.array(Image.open(data / f"masks/{image_id}.png")) > 0, 2, 1).astype(np.uint8)


def plain_means(tiles: Manifest, cams: Artifact, image_id: str) -> np.ndarray:
    """(2, H, W) float64: the mean of the tiles' maps at every pixel; absent classes are 0."""
    total = np.zeros((2, *SIZES[image_id]), np.float64)
    count = np.zeros(SIZES[image_id], np.int64)
    for name in tiles.shard_names():
        maps_of = read_cams(cams.folder.read_table(f"{name}.parquet"))
        for row in tiles.folder.read_table(f"{name}.parquet").to_pylist():
            if row["parent_id"] == image_id:
                present, maps = maps_of[row["image_id"]]
                part = np.s_[row["y_px"] : row["y_px"] + row["height_px"], row["x_px"] : row["x_px"] + row["width_px"]]
                up = upsample_cam(maps.astype(np.float32), row["height_px"], row["width_px"])
                for class_index, values in zip(present, up, strict=True):
                    total[class_index][part] += values
                count[part] += 1
    return total / count


def test_cams_are_scored_on_whole_images(made: Any, data: Path) -> None:
    _, images, tiles, cams, _ = made
    assert cams.stats()["num_images"] == tiles.num_rows()
    scores = cams.folder.read_json("scores.json")
    for split, prefix in (("train", "train"), ("val", "testB")):
        confusion = ConfusionMatrix(2)
        for image_id in SIZES:
            if image_id.startswith(prefix):
                means = plain_means(tiles, cams, image_id)
                confusion.update(means.argmax(axis=0).astype(np.uint8) + 1, truth_of(data, image_id))
        score = scores["splits"][split]
        assert score["num_images"] == images.num_rows(split)
        assert score["miou"] == pytest.approx(confusion.miou(), abs=2e-3)  # ties and rounding at single pixels
        assert score["iou"][0] is None
        assert set(score) == {"num_images", "miou", "iou", "pixel_accuracy", "all_gland", "all_not gland"}
        share = sum(int((truth_of(data, i) == 2).sum()) for i in SIZES if i.startswith(prefix))
        share /= sum(truth_of(data, i).size for i in SIZES if i.startswith(prefix))
        assert score["all_gland"]["miou"] == pytest.approx(share / 2, abs=1e-6)
    assert "no background" in scores["protocol"]["threshold"]
    assert "annotated masks" in scores["protocol"]["tile_tags"]
    assert scores["protocol"]["normalise"] == "softmax"


def test_sampled_tiles_are_scored_without_ground_truth(made: Any) -> None:
    """Each by itself, where two classes are tagged; the sample is of tiles."""
    context, _, tiles, cams, _ = made
    found = cams.folder.read_json("scores.json")["label_free"]
    sample = {
        image_id for ids in sample_ids(tiles, context.experiment.cams.num_label_free).values() for image_id in ids
    }
    rows = {row["image_id"]: row for row in tiles.rows("train").to_pylist()}
    wanted = {image_id for image_id in sample if len(rows[image_id]["labels"]) == 2}
    assert set(found["images"]) == wanted
    assert 0 < len(wanted) < len(sample)
    assert (found["thresholds"], found["best"]["threshold"]) == ([-1.0], -1.0)
    assert found["best"]["score"] == pytest.approx(np.mean(list(found["images"].values())), abs=1e-6)
    image_id = next(image_id for image_id, score in found["images"].items() if score > 0.01)
    stored = pa.concat_tables([cams.folder.read_table(f"{name}.parquet") for name in tiles.shard_names("train")])
    present, maps = read_cams(stored)[image_id]
    pixels = np.array(Image.open(rows[image_id]["uri"]))
    grid = LabelFreeGrid(maps.astype(np.float32), [index + 1 for index in present], pixels, has_background=False)
    labels = make_pseudo_mask(maps.astype(np.float32), present, pixels, PLAIN, has_background=False).labels
    assert found["images"][image_id] == pytest.approx(grid.mask_score(labels), abs=0.05)  # cells at the edges differ


def test_without_ground_truth_only_the_sample_has_maps(data: Path, tmp_path: Path) -> None:
    """Images without masks, classes beside a background: a round's maps are those of the sampled tiles."""
    (tmp_path / "table.csv").write_text(
        "image_id,image,labels,split\n"
        + "".join(f"{name},{data}/images/{name}.webp,gland,train\n" for name in SIZES if name.startswith("train"))
    )
    values = glas_values(data, str(tmp_path / "out"), {"tile_px": 24, "stride_px": 12}, choice={"strengths": [1.0]})
    values["prepare"]["source"] = {"kind": "table", "path": str(tmp_path / "table.csv")}
    values["cams"] = {"cam": {"scales": [1.0]}, "num_label_free": 6}
    context = context_of(values)
    images = prepared(context)
    tiles = cut_tiles.run(context, images)
    backbone, _ = build_backbone(context.experiment.classifier.backbone)
    classifier = stored_model(context, "rounds/00/classifier", Classifier(backbone, 1, 0, dropout=0.5), {})
    cams = make_cams.run(context, tiles, 0, classifier, images)
    sample = {image_id for ids in sample_ids(tiles, 6).values() for image_id in ids}
    assert cams.stats()["num_images"] == len(sample) < tiles.num_rows()
    scores = cams.folder.read_json("scores.json")
    assert scores["splits"] == {}
    assert set(scores["label_free"]["images"]) == sample
    choice = choose_round.run(context, tiles, [cams])
    assert choice.round_index == 0
    assert len(choice.artifact.folder.read_json("choice.json")["background"]) == 1


def test_pseudo_masks_are_of_whole_images_and_the_plain_means(made: Any, data: Path) -> None:
    _, images, tiles, cams, masks = made
    rows = {row["image_id"]: row for n in images.shard_names("train") for row in
            masks.folder.read_table(f"{n}.parquet").to_pylist()}  # fmt: skip
    assert set(rows) == {"train_1", "train_2", "train_3"}
    confusion = ConfusionMatrix(2)
    for image_id, row in rows.items():
        means = plain_means(tiles, cams, image_id)
        mask = np.array(Image.open(row["mask_uri"]))
        clear = np.abs(means[0] - means[1]) > 1e-3
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(mask[clear], means.argmax(axis=0)[clear] + 1)
        assert row["confidence"] == pytest.approx(means.max(axis=0).mean(), abs=1e-3)
        assert (row["coverage_frac"], row["ignore_frac"]) == (1.0, 0.0)
        confusion.update(mask, truth_of(data, image_id))
    scores = masks.folder.read_json("scores.json")
    assert scores["splits"]["train"]["miou"] == pytest.approx(confusion.miou(), abs=1e-6)
    assert scores["protocol"]["threshold"] == "argmax over the tagged classes alone, before 255 is set"
    assert "annotated masks" in scores["protocol"]["tile_tags"]
    assert masks.stats()["num_images"] == 3


def test_maps_of_an_image_for_the_report(made: Any) -> None:
    _, _, tiles, cams, _ = made
    name = next(n for n in tiles.shard_names() if "train_2" in _parents(tiles, n))
    rows = tiles.folder.read_table(f"{name}.parquet")
    rows = rows.filter(pc.equal(rows["parent_id"], "train_2"))
    table = cams.folder.read_table(f"{name}.parquet")
    found = maps_of_image(rows, table)
    assert found is not None
    assert found[0] == [0, 1]
    np.testing.assert_allclose(found[1], plain_means(tiles, cams, "train_2"), atol=1e-6)
    assert maps_of_image(rows, table.slice(0, 0)) is None
    assert maps_of_image(rows.slice(0, 0), table) is None


def _parents(tiles: Manifest, name: str) -> list[str]:
    return tiles.folder.read_table(f"{name}.parquet", ["parent_id"])["parent_id"].to_pylist()


def test_masks_of_tiles_are_cut_out_of_those_of_images(made: Any) -> None:
    _, _, tiles, _, masks = made
    table = pa.table({"image_id": ["train_1", "train_3"]})
    rows = tile_mask_rows(tiles.rows("train", ["image_id", "uri", "parent_id"]), table, masks.folder).to_pylist()
    assert {row["image_id"].split(".")[0] for row in rows} == {"train_1", "train_3"}
    places = {row["image_id"]: row for row in tiles.rows("train").to_pylist()}
    whole = {image_id: np.array(Image.open(masks.folder.uri(f"png/{image_id}.png"))) for image_id in SIZES
             if image_id.startswith("train")}  # fmt: skip
    for row in rows:
        place = places[row["image_id"]]
        y, x = place["y_px"], place["x_px"]
        part = whole[place["parent_id"]][y : y + 24, x : x + 24]
        np.testing.assert_array_equal(np.array(Image.open(row["mask_uri"])), part)
        sure = np.array(Image.open(masks.folder.uri(confidence_name(place["parent_id"]))))
        np.testing.assert_array_equal(np.array(Image.open(row["confidence_uri"])), sure[y : y + 24, x : x + 24])
        assert sure.max() > sure.min() > 0


def test_predictions_and_their_baselines(made: Any, data: Path) -> None:
    context, images, *_ = made
    segmenter = random_segmenter(context)
    predictions = predict.run(context, images, segmenter)
    model, classes, base_px = load_segmenter(segmenter.folder)
    assert not classes.has_background
    confusion = ConfusionMatrix(2)
    for image_id in ("testB_1", "testB_2"):
        pixels = np.array(Image.open(data / f"images/{image_id}.webp"))
        mask = np.array(Image.open(predictions.folder.uri(f"png/{image_id}.png")))
        np.testing.assert_array_equal(mask, predict_mask(model, pixels, base_px=base_px, background=False)[0])
        assert mask.min() >= 1
        confusion.update(mask, truth_of(data, image_id))
    scores = evaluate.run(context, images, predictions).folder.read_json("scores.json")
    assert scores["splits"]["val"]["miou"] == pytest.approx(confusion.miou(), abs=1e-6)
    assert set(scores["baselines"]) == {"all_not gland", "all_gland"}
    total = confusion.counts.sum()
    assert scores["baselines"]["all_gland"]["val"]["miou"] == pytest.approx(
        confusion.counts[2].sum() / total / 2, abs=1e-6
    )
    assert scores["protocol"]["threshold"] == "none: argmax over all classes"
    assert scores["protocol"]["windows"] == "no: the whole image at once"


def test_windows_of_a_large_image(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are too large to decode at once are predicted through windows, and scored."""
    values = glas_values(data, str(tmp_path / "out"), predict={"window_px": 24, "window_stride_px": 10})
    values["prepare"]["tiles"]["segmenter_sees"] = "tiles"
    context = context_of(values)
    for name in ("subcat_core.images.MAX_PIXELS", "cluster.image_reading.MAX_PIXELS", "jobs.cut_tiles.MAX_PIXELS"):
        monkeypatch.setattr(name, 1000)
    images = prepared(context)
    segmenter = random_segmenter(context)
    predictions = predict.run(context, images, segmenter)
    model, _, base_px = load_segmenter(segmenter.folder)
    pixels = np.array(Image.open(data / "images/testB_1.webp"))
    expected, _ = predict_windows(model, pixels, 2, window_px=24, stride_px=10, base_px=base_px, background=False)
    np.testing.assert_array_equal(np.array(Image.open(predictions.folder.uri("png/testB_1.png"))), expected)
    scores = evaluate.run(context, images, predictions).folder.read_json("scores.json")
    assert scores["splits"]["val"]["num_images"] == 2
    assert scores["protocol"]["windows"] == "24 px at stride 10 px, probabilities averaged"


def test_softmax_maps_beside_a_background_are_refused(data: Path, tmp_path: Path) -> None:
    context = context_of(glas_values(data, str(tmp_path / "out")))
    images = prepared(context)
    object.__setattr__(images.classes, "has_background", True)
    with pytest.raises(ValueError, match="nothing background; use"):
        make_cams.run(context, images, 0, random_classifier(context))


def test_window_settings_are_checked() -> None:
    assert PredictSettings(window_px=31).stride_px == 15
    for wrong in ({"window_stride_px": 8}, {"window_px": 16, "window_stride_px": 17}):
        with pytest.raises(ValueError, match="windows would leave gaps"):
            PredictSettings(**wrong)


# Two images of 2 x 4 px in tiles of 2 x 2 px at stride 1; image b has no ground truth.
TABLE = pa.table(
    {
        "image_id": [f"{p}{x}" for p in "ab" for x in range(3)],
        "parent_id": [p for p in "ab" for _ in range(3)],
        "y_px": [0] * 6,
        "x_px": [0, 1, 2] * 2,
        "labels": [[0], [0, 2], [], [2], [2], [2]],
    }
)
IMAGES = pa.table({"image_id": ["a", "b"], "mask_uri": ["a.png", None], "height_px": [2, 2], "width_px": [4, 4]})


def _scorer(truth: np.ndarray, sweep: ThresholdSweep) -> TileScorer:
    return TileScorer(TABLE, IMAGES, lambda row: truth, {"sweep": sweep})


def test_scorer_by_hand() -> None:
    truth, sweep = np.array([[1, 1, 3, IGNORE]] * 2, np.uint8), ThresholdSweep(3, [0.0, 0.2, 0.45])
    scorer = _scorer(truth, sweep)
    rows = TABLE.to_pylist()
    maps = {0: [[0.4]], 1: [[0.2], [0.6]], 2: [], 3: [[1.0]], 4: [[1.0]], 5: [[1.0]]}
    for index, row in enumerate(rows):
        of_tile = np.array(maps[index], np.float32).reshape(-1, 1, 1) * np.ones((1, 2, 2), np.float32)
        scorer.add(row, row["labels"], {"sweep": of_tile})
    scorer.finish()
    # class 0: 0.4, 0.3, 0.1, 0; class 2: 0, 0.3, 0.3, 0 over the columns; ties go to class 0
    assert scorer.num_scored == 1
    at_02 = np.zeros((4, 4), np.int64)
    at_02[1, 1], at_02[3, 3] = 4, 2
    np.testing.assert_array_equal(sweep.confusion(1).counts, at_02)
    at_045 = np.zeros((4, 4), np.int64)
    at_045[1, 0], at_045[3, 0] = 4, 2
    np.testing.assert_array_equal(sweep.confusion(2).counts, at_045)


def test_an_image_with_a_missing_tile_is_not_scored() -> None:
    sweep = ThresholdSweep(3, [0.2])
    scorer = _scorer(np.ones((2, 4), np.uint8), sweep)
    rows = TABLE.to_pylist()
    scorer.add(rows[0], [0], {"sweep": np.ones((1, 2, 2), np.float32)})
    scorer.drop("a")
    scorer.add(rows[2], [], {"sweep": np.ones((0, 2, 2), np.float32)})
    scorer.finish()
    assert (scorer.num_scored, scorer.bad, sweep.histogram.sum()) == (0, [], 0)


def test_ground_truth_that_does_not_fit_is_bad_once() -> None:
    scorer = _scorer(np.ones((3, 4), np.uint8), ThresholdSweep(3, [0.2]))
    for row in TABLE.to_pylist()[:3]:
        scorer.add(row, row["labels"], {"sweep": np.ones((len(row["labels"]), 2, 2), np.float32)})
    scorer.finish()
    assert scorer.bad == [BadRow("a", "a.png", "mask of (3, 4) px, its image has 2 x 4")]


def test_tables_of_tiles() -> None:
    assert classes_by_image(TABLE) == {"a": [0, 2], "b": [2]}
    assert is_of_scored_image(TABLE, IMAGES).to_pylist() == [True] * 3 + [False] * 3
    groups = [(group.image["image_id"], group.tiles["x_px"].to_pylist()) for group in by_image(TABLE, IMAGES)]
    assert groups == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert [group.image["image_id"] for group in by_image(TABLE, IMAGES.slice(1))] == ["b"]
    assert list(by_image(TABLE.slice(0, 0), IMAGES)) == []


def test_channels_by_hand() -> None:
    maps = np.array([[[5.0]], [[7.0]]], np.float32)
    assert spread_channels(maps, [4, 1], [1, 2, 4]).ravel().tolist() == [7.0, 0.0, 5.0]
    assert spread_channels(maps[:0], [], [1, 2]).ravel().tolist() == [0.0, 0.0]
