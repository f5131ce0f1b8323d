"""What differs between runs in data, settings and protocol, and their results and times: rows for a table or a page."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from cluster.storage import Storage
from cluster.tracking_client import safe_text
from cluster.tracking_search import output_of_run
from jobs.config import ConfigError, Experiment, flattened, parse_experiment
from jobs.manifest import Manifest, open_manifest
from jobs.pipeline import CONFIG, plan
from jobs.protocol import field_text
from jobs.report_numbers import RunNumbers, read_numbers
from jobs.report_page import duration
from jobs.results import Line, scores_so_far

MISSING = "–"
_NO_RESULT = ("stream", "cluster", "tracking", "report", "compute", "max_bad_frac", "keep_checkpoints")
"""Parts of keys that say where and how fast work is done."""
_NOT_COMPARED = ("name", "output")


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """What is compared of one run. name: short, unique among the runs. manifest, numbers: None before any manifest."""

    name: str
    storage: Storage
    experiment: Experiment | None
    """None where its config.json is of other code and says what this code does not know."""
    settings: dict[str, str]
    manifest: Manifest | None
    numbers: RunNumbers | None
    scores: dict[Line, float | None]

    @property
    def state(self) -> str:
        """`finished`, or how many of its stages are complete."""
        num_done = len(self.numbers.stages) if self.numbers else 0
        if self.experiment is None:
            return f"complete stages: {num_done}"
        num_steps = len(plan(self.experiment)) - 1  # the report has no marker
        return "finished" if num_done >= num_steps else f"{num_done} of {num_steps} stages"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a text a run. differences: to the first run, None where there is none."""

    what: str
    cells: list[str]
    differences: list[float | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is told: notes are what keeps numbers from being compared. The rows hold what differs, results all."""

    runs: list[ComparedRun]
    notes: list[str]
    settings: list[Row]
    other_settings: list[Row]
    protocols: list[Row]
    results: list[Row]
    times: list[Row]


def open_runs(given: Sequence[str], tracking_uri: str | None = None) -> list[ComparedRun]:
    """Read each run. Raises ValueError for fewer than two, for one given twice, and for what is no run."""
    if len(given) < 2:
        raise ValueError(
            "one run has nothing to be compared with; give two or more (`subcat report` shows a single one)"
        )
    storages = [_find(run, tracking_uri) for run in given]
    roots = [storage.root for storage in storages]
    for root in roots:
        if roots.count(root) > 1:
            raise ValueError(f"{root}: given twice; give each run once")
    return [_read(name, storage) for name, storage in zip(short_names(roots), storages, strict=True)]


def _find(run: str, tracking_uri: str | None) -> Storage:
    storage = Storage(run)
    if storage.exists(CONFIG):
        return storage
    if not tracking_uri or "/" in run:
        hint = "" if "/" in run else "; an MLflow run id or name needs --tracking-uri or MLFLOW_TRACKING_URI"
        raise ValueError(
            f"{storage.root}: not the output of a run (no {CONFIG}); give the setting `output` of one{hint}"
        )
    storage = Storage(output_of_run(tracking_uri, run))
    if not storage.exists(CONFIG):
        raise ValueError(
            f"{run}: MLflow names {storage.root} as its output, where no {CONFIG} is seen from here; "
            "give the folder as this machine sees it"
        )
    return storage


def short_names(roots: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [PurePosixPath(root).parts for root in roots]
    for num_parts in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-num_parts:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(name: str, storage: Storage) -> ComparedRun:
    values = storage.read_json(CONFIG)
    if not isinstance(values, dict) or "rounds" not in values:
        raise ValueError(f"{storage.uri(CONFIG)}: not the settings of a run")
    experiment: Experiment | None = None
    with contextlib.suppress(ConfigError):
        experiment = parse_experiment(values)  # settings younger than the run take their defaults
        values = experiment.model_dump(mode="json")
    manifest: Manifest | None = None
    with contextlib.suppress(ValueError):
        manifest = open_manifest(storage)
    numbers = None if manifest is None else read_numbers(storage, manifest, values["rounds"], 0)
    settings = {key: safe_text(text) for key, text in flattened(values).items()}
    return ComparedRun(name, storage, experiment, settings, manifest, numbers, scores_so_far(storage))


def compare_runs(runs: list[ComparedRun]) -> Comparison:
    """What differs between the runs, and their results."""
    data = _data_note(runs)
    is_same = data is None or not data.startswith("different data")
    settings = _different([run.settings for run in runs])
    kept = {row.what: row for row in settings if row.what not in _NOT_COMPARED}
    other = [what for what in kept if any(part in _NO_RESULT for part in what.split("."))]
    old = [run.name for run in runs if run.experiment is None]
    notes = [f"the scores are of {data}"] if data and not is_same else [data] if data else []
    if old:
        notes.append(f"config.json of {', '.join(old)} is of other code: what it does not name is shown as {MISSING}")
    codes = {run.name: _codes(run) for run in runs if run.numbers}
    if len(set(codes.values())) > 1:
        notes.append(f"made by different code: {'; '.join(f'{name} {code}' for name, code in codes.items())}")
    return Comparison(
        runs=runs,
        notes=notes,
        settings=[row for what, row in kept.items() if what not in other],
        other_settings=[kept[what] for what in other],
        protocols=_protocol_rows(runs),
        results=_result_rows(runs, with_differences=is_same),
        times=_time_rows(runs),
    )


def _different(values: Sequence[dict[str, str]]) -> list[Row]:
    """Rows of the keys whose values differ; a section that one run lacks is its keys alone."""
    keys = list(dict.fromkeys(key for one in values for key in one))
    # A round that overrides nothing has the value of all rounds.
    values = [{key: one.get(key, one.get(_of_all_rounds(key), MISSING)) for key in keys} for one in values]
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    rows = [Row(key, [one[key] for one in values]) for key in keys if key not in sections]
    return [row for row in rows if len(set(row.cells)) > 1]


def _of_all_rounds(key: str) -> str:
    """`round.2.kmeans.num_clusters` -> `kmeans.num_clusters`; another key as it is."""
    return key.split(".", 2)[-1] if key.startswith("round.") else key


def _data_note(runs: Sequence[ComparedRun]) -> str | None:
    """What keeps the runs' data from being the same; None where nothing does."""
    known = [(run.name, run.manifest, run.numbers) for run in runs if run.manifest and run.numbers]
    if len({manifest.fingerprint for _, manifest, _ in known}) < 2:
        return None
    texts = {
        "classes": {name: ", ".join(manifest.classes.names) for name, manifest, _ in known},
        "images": {name: _counts(numbers.num_images) for name, _, numbers in known},
        "images with ground truth": {name: _counts(numbers.num_masks) for name, _, numbers in known},
    }
    for what, by_run in texts.items():
        if len(set(by_run.values())) > 1:
            told = "; ".join(f"{name}: {text}" for name, text in by_run.items())
            return f"different data, so none is better than another by them ({what}: {told})"
    return (
        "the manifests differ (rows, or how they were imported) but list as many images of the same classes: "
        "see that they are the same images before you compare scores"
    )


def _counts(by_split: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in by_split.items())


def _codes(run: ComparedRun) -> str:
    assert run.numbers is not None
    return ", ".join(sorted({record.code_version for record in run.numbers.stages}))


def _protocol_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """How scores were taken, where it differs among the runs that have the score."""
    rows = []
    for what in ("CAM", "pseudo masks", "segmenter", "segmenter from full masks"):
        protocols = [_protocols(run).get(what) for run in runs]
        given = [protocol for protocol in protocols if protocol is not None]
        for key in dict.fromkeys(key for protocol in given for key in protocol if key != "rng_seed"):
            cells = [MISSING if p is None or key not in p else field_text(p[key]) for p in protocols]
            if len({cell for cell, p in zip(cells, protocols, strict=True) if p is not None}) > 1:
                rows.append(Row(f"{what}: {key.replace('_', ' ')}", cells))
    return rows


def _protocols(run: ComparedRun) -> dict[str, dict[str, Any]]:
    numbers = run.numbers
    if numbers is None:
        return {}
    made = {
        "CAM": numbers.cams.get(numbers.final_round or 0),
        "pseudo masks": numbers.pseudo_masks,
        "segmenter": numbers.evaluation,
        "segmenter from full masks": numbers.supervised,
    }
    return {what: scores["protocol"] for what, scores in made.items() if scores and scores.get("protocol")}


def _result_rows(runs: Sequence[ComparedRun], with_differences: bool) -> list[Row]:
    """Every score of every run in the order of the pipeline, by what is scored and split."""
    keys = list(dict.fromkeys(key for run in runs for key in run.scores))
    keys.sort(key=lambda key: _order(key[0]))
    rows = []
    for what, split, which in keys:
        values = [run.scores.get((what, split, which)) for run in runs]
        differences: list[float | None] = []
        if with_differences and (which == "mIoU" or which.startswith("at ")):
            differences = [_difference(value, values[0]) for value in values]
        title = ", ".join(part for part in (what, split, "" if which == "mIoU" else which) if part)
        rows.append(Row(title, [_number(value) for value in values], differences))
    return rows


def _difference(value: float | None, first: float | None) -> float | None:
    """To the first run's; None where one of the two is missing, and for the same number."""
    return None if value is None or first is None or value == first else value - first


def _order(what: str) -> int:
    """Rounds of runs with fewer rounds first, then the choice, masks, segmenters: Python's sort keeps the rest."""
    starts = ("all ", "CAM, round", "spread CAM, round", "score without", "masks are", "background of", "CAM, before")
    return next((index for index, start in enumerate(starts) if what.startswith(start)), len(starts))


def _number(value: float | None) -> str:
    if value is None:
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _time_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Seconds by stage, and all together; a + where an interrupted call had done a part of the stage."""
    stages = [
        {} if run.numbers is None else {(r.stage, r.round_index): r.stats for r in run.numbers.stages} for run in runs
    ]
    rows = []
    for stage, index in sorted(dict.fromkeys(key for of_run in stages for key in of_run), key=_place):
        cells = [_seconds(of_run.get((stage, index))) for of_run in stages]
        rows.append(Row(stage if index is None else f"{stage}, round {index}", cells))
    if rows:
        totals = [sum(float(stats.get("seconds") or 0) for stats in of_run.values()) for of_run in stages]
        rows.append(Row("all stages", [duration(total) if total else MISSING for total in totals]))
        gpu_hours = [sum(float(stats.get("gpu_hours") or 0) for stats in of_run.values()) for of_run in stages]
        if any(gpu_hours):
            rows.append(Row("GPU hours", [f"{hours:.2f}" if hours else MISSING for hours in gpu_hours]))
    return rows


def _place(step: tuple[str, int | None]) -> tuple[int, int]:
    """Stages before the rounds, the rounds in order, and what comes after them; runs may have others of each."""
    stage, index = step
    if index is not None:
        return 1, index
    return (0 if stage in ("prepare", "cut_tiles") else 2), 0


def _seconds(stats: dict[str, Any] | None) -> str:
    if stats is None or "seconds" not in stats:
        return MISSING
    return duration(float(stats["seconds"])) + ("+" if stats.get("resumed") else "")


def shown(cell: str, difference: float | None) -> str:
    """A score, with its difference to the first run's in brackets."""
    return cell if difference is None else f"{cell} ({difference:+.3f})"
