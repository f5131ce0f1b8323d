"""The table over seeds: means and spreads by hand, and the error for a run that is not finished."""

from pathlib import Path

import pytest

from cluster.storage import Storage
from jobs.results import curve_markdown, markdown, rank_correlations, results_tables, same_images, scores_of_run


def test_mean_and_spread_by_hand() -> None:
    key, other = ("segmenter", "val", "mIoU"), ("CAM", "train", "best")
    table = markdown([{key: 0.4, other: None}, {key: 0.6, other: 0.5}], ["seed 0", "seed 1"])
    assert "| segmenter | val | mIoU | 0.400 | 0.600 | 0.500 | 0.141 |" in table
    assert "| CAM | train | best |  | 0.500 | 0.500 |  |" in table


def test_curve_by_hand() -> None:
    table = curve_markdown({"CAM, round 0": {0.05: [0.2, 0.4], 0.1: [0.5, 0.6]}, "CAM, round 1": {0.1: [0.7]}}, "val")
    assert table.splitlines()[0] == "| threshold, val | CAM, round 0 | CAM, round 1 |"
    assert table.splitlines()[2:] == ["| 0.05 | 0.300 |  |", "| 0.10 | 0.550 | 0.700 |"]


def test_a_finished_run_gives_every_number(finished_run: str) -> None:
    scores = scores_of_run(Storage(finished_run))
    assert {what for what, _, _ in scores} == {
        "CAM, round 0 (parents only)",
        "CAM, round 1",
        "pseudo masks",
        "segmenter",
        "all background",
        "score without ground truth, round 0",
        "score without ground truth, round 1",
        "masks are made from",
        "background of the masks",
    }
    table = results_tables([finished_run, finished_run])
    assert table.startswith("| what | split | number | seed 0 | seed 0 | mean | spread |")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the output of a run"):
        results_tables([str(tmp_path)])
    with pytest.raises(ValueError, match="not a finished run"):
        scores_of_run(Storage(str(tmp_path)))


def test_a_run_without_a_background_has_no_thresholds(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("config.json", {"rounds": 0, "rng_seed": 3})
    score = {"num_images": 2, "miou": 0.7}
    cams = {**score, "all_gland": {"miou": 0.3}, "all_not gland": {"miou": 0.2}}
    label_free = {"num_images": 3, "score": [0.2]}
    cams_scores = {"protocol": {}, "splits": {"train": cams, "val": cams}, "label_free": label_free}
    storage.write_json("rounds/00/cams/scores.json", cams_scores)
    choice = {"round_index": 0, "threshold": -1.0, "rounds": [{"score": 0.2, "threshold": -1.0}]}
    storage.write_json("choice/choice.json", {**choice, "background_by": "none", "mask": {"alpha": 12.0}})
    storage.write_json("pseudo_masks/scores.json", {"protocol": {}, "splits": {"train": score}})
    storage.write_json("evaluation/scores.json", {"protocol": {}, "splits": {"val": {**score, "miou": 0.8}}})
    storage.write_json("evaluation/marker.json", {})
    assert scores_of_run(storage) == {
        **{("all gland", split, "mIoU"): 0.3 for split in ("train", "val")},
        **{("all not gland", split, "mIoU"): 0.2 for split in ("train", "val")},
        **{("CAM, round 0 (parents only)", split, "mIoU"): 0.7 for split in ("train", "val")},
        ("score without ground truth, round 0", "sample of train", "score"): 0.2,
        ("masks are made from", "", "round"): 0,
        ("pseudo masks", "train", "mIoU"): 0.7,
        ("segmenter", "val", "mIoU"): 0.8,
    }
    assert "| all gland | val | mIoU | 0.300 | 0.300 |  |" in results_tables([str(tmp_path)])


def _curves_of_rounds(folder: Path, rounds: list[tuple[list[float], list[float]]]) -> Storage:
    storage = Storage(str(folder))
    storage.write_json("config.json", {"rounds": len(rounds) - 1, "rng_seed": 0})
    for index, (free, true) in enumerate(rounds):
        split = {"miou": true, "best": {"miou": max(true)}}
        scores = {"splits": {"train": split}, "label_free": {"num_images": 9, "score": free}}
        storage.write_json(f"rounds/{index:02d}/cams/scores.json", scores)
    return storage


def test_rank_correlations_by_hand(tmp_path: Path) -> None:
    # Over thresholds 1 and -0.5; at the thresholds picked (0.3, 0.5) and (0.4, 0.1): -1; these lose 0 and 0.2.
    storage = _curves_of_rounds(tmp_path, [([0.1, 0.2, 0.3], [0.2, 0.3, 0.5]), ([0.4, 0.2, 0.3], [0.1, 0.3, 0.2])])
    told = rank_correlations([storage])
    assert "2 rounds of 1 runs: rank correlation with mIoU 0.00 over the thresholds" in told  # (1 - 1) / 2
    assert "-1.00 over rounds and runs" in told
    assert "those that it picks lose 0.100 mIoU against the best ones, at most 0.200" in told
    assert "better in 0 of 1 pairs" in told


def test_rank_correlation_without_background_is_over_rounds_alone(tmp_path: Path) -> None:
    storage = _curves_of_rounds(tmp_path, [([0.1], [0.4]), ([0.2], [0.5])])
    for index, miou in enumerate((0.4, 0.5)):
        name = f"rounds/{index:02d}/cams/scores.json"
        scores = storage.read_json(name)
        scores["splits"]["train"] = {"miou": miou}
        storage.write_json(name, scores)
    told = rank_correlations([storage])
    assert "rank correlation with mIoU 1.00 over rounds and runs" in told
    assert "better in 1 of 1 pairs" in told


def test_rank_correlations_of_curves_that_do_not_vary_or_are_empty(tmp_path: Path) -> None:
    flat = _curves_of_rounds(tmp_path / "flat", [([0.0, 0.0], [0.2, 0.3])])
    assert "0.00 over the thresholds" in rank_correlations([flat])
    storage = _curves_of_rounds(tmp_path / "none", [([0.1, 0.2], [0.1, 0.2])])
    scores = storage.read_json("rounds/00/cams/scores.json")
    scores["splits"]["train"]["miou"] = [None, None]
    storage.write_json("rounds/00/cams/scores.json", scores)
    assert rank_correlations([storage]) == ""


def test_runs_of_other_settings_have_no_mean(finished_run: str, tmp_path: Path) -> None:
    other = Storage(str(tmp_path))
    other.write_json("config.json", {**Storage(finished_run).read_json("config.json"), "rounds": 0, "rng_seed": 5})
    with pytest.raises(ValueError, match=r"its config differs .* in rounds; a mean is only of runs"):
        results_tables([finished_run, str(tmp_path)])


def test_the_yardstick_is_of_the_same_images_or_said_to_be_of_fewer() -> None:
    tags, full = ({"protocol": {"num_train_images": number}} for number in (800, 437))
    assert same_images(tags, tags)
    assert not same_images(tags, full)
