"""The cost model by hand-computed numbers, and --dry-run as a person sees it."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import cost_stages
from jobs.config import ConfigError, Experiment, load_experiment, parse_experiment
from jobs.cost import CostAssumptions, DataCounts, StageCost, backbone_on_meta, crf_seconds, macs_of
from jobs.cost_stages import stage_costs
from jobs.dry_run import count_data, format_bytes, format_hours, parse_assumptions
from jobs.pipeline import StagePlan
from subcat_core.crf import CrfSettings
from tests.jobs.conftest import call_cli, tiny_values, write_toml

COUNTS = DataCounts("the test", {"train": 100, "val": 20}, {"train": 10, "val": 20}, 2, 1.5, 40, 60)
PIXELS = 40 * 60
CONFIGS = Path(__file__).parents[2] / "configs"
ASSUMED = CostAssumptions(image_bytes_per_px=1.0, mask_bytes_per_px=0.5)


def _experiment(**changes: Any) -> Experiment:
    return parse_experiment(tiny_values(Path("none.csv"), "none", **changes))


def _costs(experiment: Experiment) -> dict[str, StageCost]:
    """By stage and round, as "make_cams 1"."""
    found = {}
    for cost in stage_costs(experiment, COUNTS, ASSUMED):
        step = cost.step
        found[step.stage if step.round_index is None else f"{step.stage} {step.round_index}"] = cost
    return found


def test_training_is_three_passes_over_whole_batches() -> None:
    experiment = _experiment()
    network = backbone_on_meta(experiment.classifier.backbone)
    macs = macs_of(network, 48, 48)
    cost = _costs(experiment)["train_classifier 0"]
    num_crops = 25 * 2 * 4  # steps, epochs, batch
    assert cost.network_ops == 2 * macs * (3 * num_crops + 20)  # validated once, on val
    assert cost.read_bytes == (num_crops + 20) * PIXELS
    num_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert cost.written_bytes == num_bytes * (1 + 2 * 2)  # model.pt, and two checkpoints with momentum
    assert cost.kept_bytes == cost.written_bytes  # both stay
    decode_s, augment_s = PIXELS * 5.2e-9, 48 * 48 * 60e-9
    assert cost.cpu_s == pytest.approx(num_crops * (decode_s + augment_s) + 20 * decode_s)


def test_every_validation_is_counted() -> None:
    values = tiny_values(Path("none.csv"), "none")
    values["classifier"]["optimiser"] = {**values["classifier"]["optimiser"], "epochs": 5, "validate_every": 2}
    experiment = parse_experiment(values)
    macs = macs_of(backbone_on_meta(experiment.classifier.backbone), 48, 48)
    assert _costs(experiment)["train_classifier 1"].network_ops == 2 * macs * (3 * 25 * 5 * 4 + 3 * 20)


def test_maps_of_a_round_cover_what_is_scored_and_those_of_the_chosen_one_the_train_split() -> None:
    experiment = _experiment(cams={"cam": {"scales": [1.0, 0.5], "flip": True}, "num_label_free": 10})
    costs = _costs(experiment)
    network = backbone_on_meta(experiment.classifier.backbone)
    macs = 2 * (macs_of(network, 40, 60) + macs_of(network, 20, 30))
    assert [costs[name].num_images for name in ("make_cams 0", "make_cams 1", "make_train_cams")] == [40, 40, 100]
    assert costs["make_cams 0"].network_ops == 2 * macs * 40  # 30 with ground truth, 10 of the sample without
    assert costs["make_cams 0"].written_bytes == 40 * 1.5 * 10 * 15 * 2  # float16 at 4 px a cell
    assert costs["make_cams 0"].read_bytes == PIXELS * (40 + 30 * 0.5)


def test_features_and_kmeans_by_hand() -> None:
    costs = _costs(_experiment())
    assert costs["extract_features 0"].written_bytes == 100 * 512 * 2  # float16
    assert costs["extract_features 0"].num_images == 100
    kmeans = costs["cluster_features 0"]
    assert kmeans.cpu_s == pytest.approx(150 * 2 * 512 * 50 / 9.4e9)  # rows, K, D, passes
    assert kmeans.read_bytes == 100 * 512 * 2
    assert kmeans.network_ops == 0
    costs = _costs(_experiment(features={"pool": "region"}))  # a row for each of the 1.5 classes of an image
    assert costs["extract_features 0"].written_bytes == costs["cluster_features 0"].read_bytes == 150 * 512 * 2
    assert costs["extract_features 0"].num_images == 100


def test_crf_is_scaled_from_the_measured_figures() -> None:
    assert crf_seconds(375 * 500, 2, CrfSettings()) == pytest.approx(0.13, abs=0.02)
    assert crf_seconds(375 * 500, 21, CrfSettings()) == pytest.approx(0.44, abs=0.02)
    assert crf_seconds(2 * 375 * 500, 2, CrfSettings()) == 2 * crf_seconds(375 * 500, 2, CrfSettings())
    assert crf_seconds(375 * 500, 2, CrfSettings(iterations=5)) == pytest.approx(0.055 + 0.5 * (0.028 + 0.0336))
    with_crf, without = (
        _costs(_experiment(pseudo_masks={"mask": {"crf": crf}}))["make_pseudo_masks"].cpu_s for crf in ({}, None)
    )
    assert with_crf - without == pytest.approx(100 * crf_seconds(PIXELS, 2.5, CrfSettings()))


def test_predictions_and_their_score() -> None:
    costs = _costs(_experiment())
    assert costs["predict"].num_images == costs["evaluate"].num_images == 20
    assert costs["predict"].written_bytes == 20 * PIXELS * 0.5
    assert costs["evaluate"].read_bytes == 2 * 20 * PIXELS * 0.5
    crf = _costs(_experiment(predict={"crf": {}}))["predict"].cpu_s - costs["predict"].cpu_s
    assert crf == pytest.approx(20 * crf_seconds(PIXELS, 3, CrfSettings()))


def test_self_training_predicts_the_train_split_within_tags() -> None:
    costs = _costs(_experiment(self_training={}))
    predicted, train = costs["predict_train 1"], costs["predict"]
    assert (predicted.num_images, costs["train_segmenter 0"].num_images, costs["predict 0"].num_images) == (
        100,
        100,
        20,
    )
    assert predicted.network_ops == pytest.approx(5 * train.network_ops)
    plain = _costs(_experiment(self_training={"mask": {"crf": "none"}}))["predict_train 1"]
    assert predicted.cpu_s - plain.cpu_s == pytest.approx(100 * crf_seconds(PIXELS, 2.5, CrfSettings()))


def test_stages_that_see_tiles_count_them() -> None:
    """Images of 40 x 60 px in tiles of 24 px at 12 px: 3 rows (0, 12, 16) and 4 columns (0, 12, 24, 36)."""
    values = tiny_values(Path("none.csv"), "none", supervised={})
    values["prepare"]["tiles"] = {"tile_px": 24, "stride_px": 12, "tags_from_masks_frac": 0.1}
    costs = _costs(parse_experiment(values))
    assert costs["cut_tiles"].num_images == 120
    assert costs["cut_tiles"].written_bytes == pytest.approx(120 * 12 * (24 * 24 * 2.2 + 200))
    assert costs["cut_tiles"].read_bytes == PIXELS * (120 + 30 * 0.5)
    seen = ("train_classifier 0", "extract_features 0", "make_train_cams", "make_pseudo_masks")
    assert [costs[name].num_images for name in seen] == [1200] * 4
    assert costs["train_segmenter"].num_images == costs["train_supervised"].num_images == 100
    assert costs["predict"].num_images == 20
    assert "cut_supervised_masks" not in costs
    values["prepare"]["tiles"]["segmenter_sees"] = "tiles"
    costs = _costs(parse_experiment(values))
    assert costs["train_segmenter"].num_images == costs["train_supervised"].num_images == 1200
    assert costs["cut_supervised_masks"].written_bytes == 1200 * 24 * 24 * 0.5


def test_hours_by_the_assumed_rates() -> None:
    step = StagePlan("make_cams", 0, "folder")
    assumed = CostAssumptions(gpu_tflops=100.0, fp32_frac=0.5, cpu_gflops=50.0, depthwise_frac=0.25)
    cost = StageCost(step, network_ops=3600e12, cpu_s=7200)
    assert cost.gpu_hours(assumed) == pytest.approx(0.02)  # 3600e12 / 50e12 = 72 s
    assert cost.cpu_hours() == 2
    assert cost.hours_without_gpu(assumed) == pytest.approx(2 + 20)
    assert StageCost(step, network_ops=3600e12, bf16=True).gpu_hours(assumed) == pytest.approx(0.01)
    assert StageCost(step, network_ops=3600e12, depthwise=True).gpu_hours(assumed) == pytest.approx(0.08)


def test_a_round_has_its_own_settings_and_unknown_stages_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = _experiment(round={"1": {"classifier": {"optimiser": {"epochs": 4}}}})
    costs = _costs(experiment)
    assert costs["train_classifier 1"].what is not None
    assert costs["train_classifier 1"].what.startswith("4 epochs, 100 steps")
    assert costs["report"].what is None
    known = {name: estimate for name, estimate in cost_stages._ESTIMATES.items() if name != "predict"}
    monkeypatch.setattr(cost_stages, "_ESTIMATES", known)
    assert _costs(experiment)["predict"].what is None


def test_counts_of_options_lists_and_manifest(
    monkeypatch: pytest.MonkeyPatch, tiny_table: Path, tmp_path: Path
) -> None:
    lists = parse_experiment(tiny_values(tiny_table, str(tmp_path / "out")))
    counts = count_data(lists, CostAssumptions())
    assert (counts.num_images, counts.num_masks) == ({"train": 12, "val": 4}, {"train": 12, "val": 4})
    assert counts.labels_per_image == pytest.approx(16 / 12)  # every third image has both classes
    assert (counts.height_px, counts.width_px, counts.num_classes) == (375, 500, 2)
    assert counts.origin.startswith("the lists of")

    config = write_toml(tmp_path / "tiny.toml", tiny_values(tiny_table, str(tmp_path / "out")))
    assert call_cli(monkeypatch, "prepare", config) == 0
    counts = count_data(lists, CostAssumptions(image_width_px=99))
    assert counts.origin.startswith("the manifest in")
    assert (counts.num_images, counts.height_px, counts.width_px) == ({"train": 12, "val": 4}, 48, 99)

    source = {"kind": "coco", "path": "elsewhere"}
    coco = parse_experiment(tiny_values(tiny_table, "none", prepare={"source": source}))
    counts = count_data(coco, parse_assumptions(82081, 40137, None, ["num_train_masks=5", "labels_per_image=2.9"]))
    assert counts.num_images == {"train": 82081, "val": 40137}
    assert counts.num_masks == {"train": 5, "val": 40137}
    assert (counts.num_classes, counts.labels_per_image, counts.height_px, counts.width_px) == (80, 2.9, 480, 640)


def test_assumptions_are_checked() -> None:
    assert parse_assumptions(None, None, 395.0, ["cpu_gflops=40"]) == CostAssumptions(gpu_tflops=395.0, cpu_gflops=40.0)
    for text, said in (
        ("tflop=3", "nearest: gpu_tflops"),
        ("cpu_gflops", "expected KEY=NUMBER"),
        ("cpu_gflops=fast", "'fast' is no number"),
        ("cpu_gflops=-1", "cpu_gflops = -1.*greater than 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_assumptions(None, None, None, [text])


def test_dry_run_prints_the_cost_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_table: Path
) -> None:
    config = write_toml(tmp_path / "tiny.toml", tiny_values(tiny_table, str(tmp_path / "out")))
    assert call_cli(monkeypatch, "run", config, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "train_classifier 1: 2 epochs, 6 steps" in told
    assert "images: 12 train (12 with masks), 4 val (4 with masks), from the lists of" in told
    assert "gpu_tflops = 125" in told
    assert call_cli(monkeypatch, "run", config, "--dry-run", "--num-train", "10582", "--num-val", "1449") == 0
    assert "images: 10,582 train (0 with masks), 1,449 val (1,449 with masks)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_dry_run_of_lists_that_are_elsewhere_asks_for_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_toml(tmp_path / "tiny.toml", tiny_values(tmp_path / "none.csv", str(tmp_path / "out")))
    assert call_cli(monkeypatch, "run", config, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "no estimate of the cost: the lists cannot be read here" in told
    assert "give --num-train and --num-val" in told
    assert "kmeans.num_clusters = 2" in told
    assert call_cli(monkeypatch, "run", config, "--num-train", "5") == 2
    assert "num_train: only --dry-run assumes something" in capsys.readouterr().err


def test_numbers_are_short() -> None:
    assert [format_bytes(value) for value in (0, 12, 1234, 45_000_000, 2.5e12)] == [
        "",
        "12 B",
        "1.2 kB",
        "45 MB",
        "2.5 TB",
    ]
    assert [format_hours(value) for value in (0, 0.002, 0.5, 1234)] == ["", "< 0.01", "0.50", "1,234"]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.toml")))
def test_every_shipped_config_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--num-train", "1000", "--num-val", "100", "--set", f"output={json.dumps(str(tmp_path / 'out'))}"]
    assert call_cli(monkeypatch, "run", str(CONFIGS / name), "--dry-run", *arguments) == 0
    told = capsys.readouterr().out
    assert "no estimate of the cost" not in told
    assert "all stages" in told


def test_the_presets_say_what_was_published() -> None:
    voc = load_experiment(str(CONFIGS / "voc12.toml"))
    lengths = [voc.for_round(index).classifier.optimiser.length(10_582) for index in range(voc.rounds + 1)]
    assert [(length.num_steps, length.num_epochs) for length in lengths] == [
        (661 * epochs, epochs) for epochs in (15, 31, 41, 51)
    ]
    assert voc.choice.round == "last"
    assert (voc.kmeans.num_clusters, voc.kmeans.num_restarts, voc.classifier.subcategory_weight) == (10, 10, 5.0)
    assert voc.cams.cam.scales == (1.0, 0.5, 1.5, 2.0)
    assert voc.segmenter.optimiser.length(10_582).num_steps == 20_000
    coco = load_experiment(str(CONFIGS / "coco14.toml"))
    num_updates = coco.classifier.optimiser.length(82_081).num_steps
    assert num_updates == pytest.approx(61 * 661, rel=0.02)  # as many as VOC's plan
    assert coco.prepare.source.kind == "coco"
