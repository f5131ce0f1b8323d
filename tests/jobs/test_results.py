"""The table over seeds: means and spreads by hand, and the error for a run that is not finished."""

from pathlib import Path

import pytest

from cluster.storage import Storage
from jobs.results import markdown, results_table, scores_of_run


def test_mean_and_spread_by_hand() -> None:
    key, other = ("segmenter", "val", "mIoU"), ("CAM", "train", "best")
    table = markdown([{key: 0.4, other: None}, {key: 0.6, other: 0.5}], ["seed 0", "seed 1"])
    assert "| segmenter | val | mIoU | 0.400 | 0.600 | 0.500 | 0.141 |" in table
    assert "| CAM | train | best |  | 0.500 | 0.500 |  |" in table


def test_a_finished_run_gives_every_number(finished_run: str) -> None:
    scores = scores_of_run(Storage(finished_run))
    assert {what for what, _, _ in scores} == {
        "CAM, round 0 (parents only)",
        "CAM, round 1",
        "pseudo masks",
        "segmenter",
        "all background",
    }
    table = results_table([finished_run, finished_run])
    assert table.startswith("| what | split | number | seed 0 | seed 0 | mean | spread |")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the output of a run"):
        results_table([str(tmp_path)])
    with pytest.raises(ValueError, match="not a finished run"):
        scores_of_run(Storage(str(tmp_path)))
