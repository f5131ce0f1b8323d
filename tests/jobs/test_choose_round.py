"""The choice of a round and of the background, without ground truth: by hand, and on a finished run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import pipeline
from jobs.choose_round import ChoiceSettings, background_candidates, choose_round
from jobs.config import parse_experiment
from jobs.context import StageContext
from jobs.manifest import open_manifest
from jobs.sample import sample_ids
from subcat_core.pseudo_mask import PseudoMaskSettings
from tests.jobs.conftest import small_values


def _round(scores: dict[str, float]) -> dict[str, Any]:
    return {"images": scores, "best": {"threshold": 0.3, "score": sum(scores.values()) / len(scores)}}


def test_a_round_is_kept_where_it_is_clearly_better_than_the_one_kept_before() -> None:
    first = _round({"a": 0.1, "b": 0.2, "c": 0.3})
    better = _round({"a": 0.2, "b": 0.31, "c": 0.4})  # +0.1, +0.11, +0.1: mean 0.1033, standard error 0.0033
    unsure = _round({"a": 0.9, "b": 0.31, "c": 0.4})  # +0.7, 0, 0 against `better`: mean 0.233, standard error 0.233
    worse = _round({"a": 0.1, "b": 0.1, "c": 0.1})
    best = _round({"a": 0.3, "b": 0.42, "c": 0.5, "d": 0.0})  # d is not compared: `better` did not score it
    steps, kept = choose_round([first, better, unsure, worse, best], ChoiceSettings())
    assert kept == 4
    assert [step["compared_with"] for step in steps] == [0, 0, 1, 1, 1]
    assert [step["clearly_better"] for step in steps] == [False, True, False, False, True]
    assert steps[1]["difference"] == pytest.approx(0.103333, abs=1e-6)
    assert steps[1]["standard_error"] == pytest.approx(0.003333, abs=1e-6)
    assert steps[2]["standard_error"] == pytest.approx(0.233333, abs=1e-6)
    assert steps[4]["num_images"] == 3
    assert choose_round([first, worse], ChoiceSettings())[1] == 0
    assert choose_round([first, worse], ChoiceSettings(round="last"))[1] == 1


def test_background_candidates_break_even_by_hand() -> None:
    # (1 - 0.5)^1 = 0.5 and (1 - 0.25)^4.8188 = 0.25
    candidates = background_candidates(PseudoMaskSettings(), 0.5, (1.0, 0.5))
    assert [each.alpha for each in candidates] == pytest.approx([1.0, 4.8188], abs=1e-4)
    constant = PseudoMaskSettings(background="constant")
    assert [each.background_score for each in background_candidates(constant, 0.5, (1.0, 0.5))] == [0.5, 0.25]
    assert background_candidates(constant, 0.0, (1.0, 0.5)) == [constant]


def _run(values: dict[str, Any]) -> Storage:
    experiment = parse_experiment(values)
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        pipeline.run(StageContext(experiment, storage, Progress(), tracker), "make_pseudo_masks")
    return storage


def _tables(storage: Storage, folder: str) -> pa.Table:
    names = [name for name in storage.list_names(folder) if name.startswith("part-") and name.endswith(".parquet")]
    return pa.concat_tables([storage.read_table(f"{folder}/{name}") for name in names])


def test_the_chosen_background_makes_the_masks(tiny_table: Path, tmp_path: Path) -> None:
    values = small_values(tiny_table, str(tmp_path / "out"), rounds=1)
    experiment, storage = parse_experiment(values), _run(values)
    choice = storage.read_json("choice/choice.json")
    tried = choice["background"]
    assert len(tried) == len(ChoiceSettings().strengths)
    best = max(tried, key=lambda each: each["score"])
    assert choice["mask"]["alpha"] == best["alpha"] != PseudoMaskSettings().alpha
    assert (choice["round_by"], choice["background_by"]) == ("label_free", "label_free")
    inputs = storage.read_json("pseudo_masks/marker.json")["inputs"]
    made_with = experiment.pseudo_masks.mask.model_copy(update={"alpha": best["alpha"]})
    assert inputs["settings"]["mask"] == made_with.model_dump(mode="json")
    made = _tables(storage, "cams")
    assert made.num_rows == 12  # the whole train split, and nothing else
    of_round = _tables(storage, f"rounds/{choice['round_index']:02d}/cams")
    of = dict(zip(*(of_round[name].to_pylist() for name in ("image_id", "cam")), strict=True))
    for image_id, cam in zip(*(made[name].to_pylist() for name in ("image_id", "cam")), strict=True):
        assert cam == pytest.approx(of[image_id], abs=2e-3)  # batches differ, so rounding does


def test_the_paper_takes_the_last_round_and_its_own_background(tiny_table: Path, tmp_path: Path) -> None:
    values = small_values(tiny_table, str(tmp_path / "out"), rounds=1)
    storage = _run({**values, "choice": {"round": "last", "background": "config"}})
    choice = storage.read_json("choice/choice.json")
    assert choice["round_index"] == 1
    assert "background" not in choice
    assert choice["mask"]["alpha"] == PseudoMaskSettings().alpha
    assert (choice["round_by"], choice["background_by"]) == ("last", "config")


def test_the_sample_lies_evenly_and_is_the_same_every_time(finished_run: str) -> None:
    manifest = open_manifest(Storage(finished_run))
    assert manifest.shard_names("train") == ["part-00000", "part-00001", "part-00002"]
    sample = sample_ids(manifest, 6)
    assert {name: len(ids) for name, ids in sample.items()} == {"part-00000": 2, "part-00001": 2, "part-00002": 2}
    assert sample == sample_ids(manifest, 6)
    assert sum(len(ids) for ids in sample_ids(manifest, 1000).values()) == 12
