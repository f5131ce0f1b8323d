"""compare: settings, protocols and scores by hand, what is told of other data and of missing stages, the page."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.storage import Storage
from jobs.compare import print_comparison
from jobs.compare_page import comparison_page
from jobs.compare_runs import Comparison, compare_runs, open_runs, short_names
from jobs.config import parse_experiment
from jobs.manifest import ShardEntry, write_index
from subcat_core.classes import ClassTable
from tests.jobs.conftest import call_cli, tiny_values
from tests.jobs.test_report import checked, fabricate


def _run(folder: Path, *, classes: tuple[str, ...] = ("cat", "dog"), data: str = "a", **changes: Any) -> Storage:
    """A run that has its settings and its manifest, and nothing else yet."""
    storage = Storage(str(folder))
    experiment = parse_experiment(tiny_values(Path("labels.csv"), storage.root, **changes))
    storage.write_json("config.json", experiment.model_dump(mode="json"))
    write_index(storage.child("manifest"), ClassTable(classes), [ShardEntry("part-00000", "val", 4, 4)])
    _mark(storage, "manifest", 2.0, inputs={"stage": "prepare"}, fingerprint=data)
    return storage


def _mark(storage: Storage, folder: str, seconds: float, inputs: dict[str, str] | None = None, **stats: Any) -> None:
    marker = {"inputs": inputs or {}, "code_version": "c0de", "stats": {"seconds": seconds, **stats}}
    storage.write_json(f"{folder}/marker.json", marker)


def _score_cams(storage: Storage, index: int, best: float, **protocol: Any) -> None:
    curve = {"thresholds": [0.15, 0.3], "miou": [0.2, best], "num_images": 4}
    curve |= {"fixed": {"threshold": 0.15, "miou": 0.2}, "best": {"threshold": 0.3, "miou": best}}
    scores = {"protocol": {"crf": "no", **protocol}, "splits": {"val": curve}}
    storage.write_json(f"rounds/{index:02d}/cams/scores.json", scores)
    _mark(storage, f"rounds/{index:02d}/cams", 65.0, resumed=index == 1)


def _score_masks(storage: Storage, folder: str, miou: float) -> None:
    storage.write_json(f"{folder}/scores.json", {"protocol": {}, "splits": {"val": {"num_images": 4, "miou": miou}}})
    _mark(storage, folder, 1.0)


def _compared(*storages: Storage) -> Comparison:
    return compare_runs(open_runs([storage.root for storage in storages]))


def _cells(rows: list[Any]) -> dict[str, list[str]]:
    return {row.what: row.cells for row in rows}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Storage, Storage]:
    """`few` with a round scored and all its masks; `many` with two rounds scored, other settings, and no masks yet."""
    few = _run(tmp_path / "few", rng_seed=3)
    _score_cams(few, 0, 0.5)
    _score_masks(few, "pseudo_masks", 0.55)
    _score_masks(few, "evaluation", 0.6)
    round_1 = {"1": {"classifier": {"subcategory_weight": 2.0}}}
    stream = {"num_actors": 0, "gpus_per_actor": 0.5}
    many = _run(tmp_path / "many", kmeans={"num_clusters": 7, "num_restarts": 2}, round=round_1, stream=stream)
    _score_cams(many, 0, 0.48)
    _score_cams(many, 1, 0.53, scales=[1.0, 0.5])
    return few, many


def test_only_settings_that_differ_are_told(pair: tuple[Storage, Storage]) -> None:
    compared = _compared(*pair)
    assert _cells(compared.settings) == {
        "rng_seed": ["3", "0"],
        "kmeans.num_clusters": ["2", "7"],
        "round.1.classifier.subcategory_weight": ["5.0", "2.0"],  # a round without overrides has that of all rounds
    }
    assert _cells(compared.other_settings) == {"stream.gpus_per_actor": ["0.0", "0.5"]}
    assert [run.name for run in compared.runs] == ["few", "many"]
    assert compared.notes == []


def test_a_section_that_one_run_lacks_is_shown_by_its_keys(tmp_path: Path) -> None:
    compared = _compared(_run(tmp_path / "a"), _run(tmp_path / "b", self_training={"rounds": 2}))
    cells = _cells(compared.settings)
    assert cells["self_training.rounds"] == ["–", "2"]
    assert "self_training" not in cells


def test_results_stand_side_by_side_with_what_is_missing(pair: tuple[Storage, Storage]) -> None:
    rows = {row.what: row for row in _compared(*pair).results}
    best = rows["CAM, round 0 (parents only), val, at best threshold"]
    assert best.cells == ["0.500", "0.480"]
    assert best.differences == [None, pytest.approx(-0.02)]
    assert rows["CAM, round 0 (parents only), val, at 0.15"].differences == [None, None]  # the same
    assert rows["CAM, round 1, val, at best threshold"].cells == ["–", "0.530"]
    assert rows["pseudo masks, val"].cells == ["0.550", "–"]
    assert rows["segmenter, val"].differences == [None, None]
    assert [what for what in rows if "best threshold" not in what] == [
        "CAM, round 0 (parents only), val, at 0.15",
        "CAM, round 1, val, at 0.15",
        "pseudo masks, val",
        "segmenter, val",
    ]


def test_time_by_stage(pair: tuple[Storage, Storage]) -> None:
    compared = _compared(*pair)
    assert list(_cells(compared.times).items()) == list(
        {
            "prepare": ["2.0 s", "2.0 s"],
            "make_cams, round 0": ["1 min 05 s", "1 min 05 s"],
            "make_cams, round 1": ["–", "1 min 05 s+"],
            "make_pseudo_masks": ["1.0 s", "–"],
            "evaluate": ["1.0 s", "–"],
            "all stages": ["1 min 09 s", "2 min 12 s"],
        }.items()
    )
    assert [run.state for run in compared.runs] == ["4 of 13 stages", "3 of 13 stages"]


def test_protocols_are_told_where_they_differ(pair: tuple[Storage, Storage]) -> None:
    assert _cells(_compared(*pair).protocols) == {"CAM: scales": ["–", "1.0, 0.5"]}


def test_other_data_is_told_and_gives_no_differences(tmp_path: Path) -> None:
    cats = _run(tmp_path / "cats")
    glands = _run(tmp_path / "glands", classes=("gland",), data="b")
    for storage, value in ((cats, 0.5), (glands, 0.7)):
        _score_cams(storage, 0, value)
    compared = _compared(cats, glands)
    (note,) = compared.notes
    assert note.startswith("the scores are of different data, so none is better")
    assert "(classes: cats: cat, dog; glands: gland)" in note
    assert not any(by for row in compared.results for by in row.differences)
    again = _run(tmp_path / "again", data="c")
    (note,) = _compared(cats, again).notes
    assert "as many images of the same classes: see that they are the same images" in note


def test_settings_of_other_code_are_compared_as_they_are(tmp_path: Path) -> None:
    new, old = _run(tmp_path / "new"), _run(tmp_path / "old")
    old.write_json("config.json", {"rounds": 1, "kmeans": {"num_clusters": 2, "warp": 9}})
    compared = _compared(new, old)
    assert compared.notes == ["config.json of old is of other code: what it does not name is shown as –"]
    assert _cells(compared.settings)["kmeans.warp"] == ["–", "9"]
    assert compared.runs[1].state == "complete stages: 1"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    begun = Storage(str(tmp_path / "begun"))
    other = _run(tmp_path / "other")
    begun.write_json("config.json", other.read_json("config.json"))
    compared = _compared(begun, other)
    assert (compared.results, compared.settings) == ([], [])
    assert _cells(compared.times)["prepare"] == ["–", "2.0 s"]
    assert "None of these runs has a score yet." in comparison_page(compared, 4)


def test_names_are_as_long_as_it_takes() -> None:
    assert short_names(["/x/a", "/x/b"]) == ["a", "b"]
    assert short_names(["/x/one/out", "s3://x/two/out"]) == ["one/out", "two/out"]


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    run = _run(tmp_path / "run").root
    with pytest.raises(ValueError, match="one run has nothing to be compared with; give two or more"):
        open_runs([run])
    with pytest.raises(ValueError, match="run: given twice; give each run once"):
        open_runs([run, f"{run}/"])
    with pytest.raises(ValueError, match=r"empty: not the output of a run \(no config.json\); give the"):
        open_runs([run, str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"an MLflow run id or name needs --tracking-uri or MLFLOW_TRACKING_URI"):
        open_runs([run, "no-such-run"])
    Storage(str(tmp_path / "odd")).write_json("config.json", {"title": "another program's"})
    with pytest.raises(ValueError, match=r"odd/config.json: not the settings of a run"):
        open_runs([run, str(tmp_path / "odd")])


def test_the_tables_can_be_read_at_100_columns(pair: tuple[Storage, Storage], tmp_path: Path) -> None:
    third = _run(tmp_path / "a [red] name", kmeans={"num_clusters": 12, "num_restarts": 2})
    stream = io.StringIO()
    print_comparison(_compared(*pair, third), Console(width=100, file=stream))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 100 for line in lines[3:])  # the first three name the folders, however long
    assert not [line for line in lines if "…" in line]
    assert [line.split() for line in lines if "num_clusters" in line] == [["kmeans.num_clusters", "2", "7", "12"]]
    (best,) = (line for line in lines if "round 0" in line and "at best threshold" in line)
    assert best.split()[-3:] == ["0.480", "(-0.020)", "–"]
    assert any("a [red] name" in line for line in lines[3:])


def _fabricated(folder: Path, **changes: Any) -> Storage:
    """A finished run with masks and maps, of pictures with the same ids everywhere."""
    folder.mkdir()
    storage = fabricate(folder)
    experiment = parse_experiment(tiny_values(Path("labels.csv"), storage.root, rounds=2, **changes))
    storage.write_json("config.json", experiment.model_dump(mode="json"))
    return storage


def test_the_page_shows_the_same_pictures_of_each_run(tmp_path: Path) -> None:
    one, other = _fabricated(tmp_path / "one"), _fabricated(tmp_path / "other", rng_seed=4)
    page = comparison_page(_compared(one, other), 3)
    text = " ".join(checked(page).text)
    for expected in ("one/out · other/out", "rng_seed", "0.612", "mIoU of CAMs, val", "all stages", "ground truth"):
        assert expected in text, expected
    for run in ("one/out", "other/out"):
        assert text.count(f"{run}: prediction") == 3
        assert text.count(f"{run}: CAM, round 2") >= 3
    assert page.count('<article class="example">') == 3
    assert page.count("<polyline") >= 4  # two splits, two runs
    assert comparison_page(_compared(one, other), 3) == page
    assert "None was asked for." in comparison_page(_compared(one, other), 0)


def test_without_masks_the_page_shows_maps(tmp_path: Path) -> None:
    one, other = _fabricated(tmp_path / "one"), _fabricated(tmp_path / "other")
    for storage in (one, other):
        storage.delete_tree("predictions")
    other.delete_tree("pseudo_masks")
    text = " ".join(checked(comparison_page(_compared(one, other), 2)).text)
    assert "No two runs have masks of the same images yet, so these are maps." in text
    assert text.count("one/out: CAM, round 2") >= 2
    assert text.count("other/out: CAM, round 2") >= 2


def test_a_finished_and_an_unfinished_run_from_the_command_line(
    finished_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished_run, half, ignore=shutil.ignore_patterns("*.pt", "segmenter", "predictions", "evaluation"))
    config = json.loads((half / "config.json").read_text())
    config["segmenter"]["optimiser"]["epochs"] = 9
    (half / "config.json").write_text(json.dumps(config))
    page = tmp_path / "pages" / "compare.html"
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call_cli(monkeypatch, "compare", finished_run, str(half), "--output", str(page)) == 0
    printed = capsys.readouterr().out
    assert f"page: {page}" in printed
    told = {" ".join(line.split()[:-2]): line.split()[-2:] for line in printed.splitlines() if len(line.split()) > 2}
    assert told["segmenter.optimiser.epochs"] == ["2", "9"]
    scores = Storage(finished_run).read_json("evaluation/scores.json")["splits"]["val"]
    assert told["segmenter, val"] == [f"{scores['miou']:.3f}", "–"]
    masks = Storage(finished_run).read_json("pseudo_masks/scores.json")["splits"]["train"]
    assert told["pseudo masks, train"] == [f"{masks['miou']:.3f}"] * 2
    text = " ".join(checked(page.read_text(encoding="utf-8")).text)
    assert "half: pseudo mask" in text
    assert call_cli(monkeypatch, "compare", finished_run) == 2
    assert "one run has nothing to be compared with" in capsys.readouterr().err
