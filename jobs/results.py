"""`subcat results RUN RUN ...`: the scores of several runs of one config as Markdown tables, mean and spread.

Runs differ in rng_seed alone; docs/results.md holds what this prints. The spread is the sample standard deviation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cluster.storage import Storage
from jobs.protocol import protocol_markdown

Line = tuple[str, str, str]
"""(what, split, which number)"""
WALK_STEPS = {"before_walk": "CAM, before the walk", "before_crf": "+ random walk"}
"""Scores of the steps before a pseudo mask, in scores.json where there was a random walk: key -> name in tables."""
_CURVE_STEP = 0.05


def results_tables(outputs: list[str]) -> str:
    """The tables of the runs with these output folders. Raises ValueError for one that is not a finished run."""
    storages = [Storage(path) for path in outputs]
    missing = [storage.root for storage in storages if not storage.exists("config.json")]
    if missing:
        raise ValueError(f"not the output of a run: {', '.join(missing)}; give output folders of finished runs")
    seeds = [f"seed {storage.read_json('config.json')['rng_seed']}" for storage in storages]
    scores = markdown([scores_of_run(storage) for storage in storages], seeds)
    curves = "\n\n".join(curve_markdown(curves, split) for split, curves in _curves(storages).items())
    parts = [scores, protocol_markdown(_protocols(storages[0])), curves, rank_correlations(storages)]
    return "\n\n".join(part for part in parts if part)


def scores_of_run(storage: Storage) -> dict[Line, float | None]:
    """Every mIoU of one finished run. Raises ValueError when the run is not finished."""
    if not storage.exists("evaluation/marker.json"):
        raise ValueError(f"{storage.root}: not a finished run (no evaluation/marker.json); run its config to the end")
    lines: dict[Line, float | None] = {}
    for index, cams in enumerate(_cams(storage)):
        for split, score in cams["splits"].items():
            for key in score:
                if key.startswith("all_"):
                    lines.setdefault((key.replace("all_", "all ", 1), split, "mIoU"), score[key]["miou"])
            kinds = [("spread CAM", score)] if "plain" in score else [("CAM", score)]
            kinds = [("CAM", score["plain"]), *kinds] if "plain" in score else kinds
            for kind, curve in kinds:
                name = f"{kind}, round {index}" + (" (parents only)" if index == 0 else "")
                if "fixed" not in curve:  # no background, so no threshold
                    lines[(name, split, "mIoU")] = curve["miou"]
                    continue
                lines[(name, split, f"at {curve['fixed']['threshold']:.2f}")] = curve["fixed"]["miou"]
                lines[(name, split, "at best threshold")] = curve["best"]["miou"]
                lines[(name, split, "best threshold")] = curve["best"]["threshold"]
    choice = storage.read_json("choice/choice.json")
    for index, step in enumerate(choice["rounds"]):
        lines[(f"score without ground truth, round {index}", "sample of train", "score")] = step["score"]
        if step["threshold"] >= 0:  # below 0: no background, so none
            lines[(f"score without ground truth, round {index}", "sample of train", "its threshold")] = step[
                "threshold"
            ]
    lines[("round chosen by it", "", "round")] = choice["round_index"]
    if choice["threshold"] >= 0:
        lines[("background chosen by it", "", "alpha")] = choice["mask"]["alpha"]
    for split, score in storage.read_json("pseudo_masks/scores.json")["splits"].items():
        for key, name in WALK_STEPS.items():
            if key in score:
                lines[(name, split, "mIoU")] = score[key]["miou"]
        lines[("pseudo masks", split, "mIoU")] = score["miou"]
    for split, score in storage.read_json("evaluation/scores.json")["splits"].items():
        lines[("segmenter", split, "mIoU")] = score["miou"]
    if storage.exists("supervised/evaluation/scores.json"):
        for split, score in storage.read_json("supervised/evaluation/scores.json")["splits"].items():
            lines[("segmenter from full masks", split, "mIoU")] = score["miou"]
            from_tags = lines[("segmenter", split, "mIoU")]
            ratio = from_tags / score["miou"] if from_tags is not None and score["miou"] else None
            lines[("tags / full masks", split, "ratio")] = ratio
    return lines


def rank_correlations(storages: Sequence[Storage]) -> str:
    """Spearman's rank correlation of the score without ground truth with the true mIoU of the same maps.

    Over every round and threshold of all runs together, of the train split, and how much mIoU is lost by taking each
    round's threshold by that score instead of by ground truth. Empty where nothing has ground truth.
    """
    free, true, losses = [], [], []
    for storage in storages:
        for cams in _cams(storage):
            if "thresholds" in cams["splits"].get("train", {}) and cams["label_free"]["num_images"]:
                split, score = cams["splits"]["train"], cams["label_free"]["score"]
                pairs = [pair for pair in zip(score, split["miou"], strict=True) if pair[1] is not None]
                free += [pair[0] for pair in pairs]
                true += [pair[1] for pair in pairs]
                losses.append(split["best"]["miou"] - split["miou"][score.index(max(score))])
    if len(free) < 2:
        return ""
    return (
        f"Score without ground truth against mIoU on train, {len(losses)} rounds, {len(free)} pairs of round and "
        f"threshold: rank correlation {statistics.correlation(_ranks(free), _ranks(true)):.3f}; its thresholds lose "
        f"{statistics.mean(losses):.3f} mIoU against the best ones (at most {max(losses):.3f})."
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """1-based ranks; equal values share the mean of theirs."""
    positions: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values), 1):
        positions.setdefault(value, []).append(rank)
    return [statistics.mean(positions[value]) for value in values]


def _protocols(storage: Storage) -> dict[str, dict[str, Any]]:
    """How each kind of number was taken."""
    scored = {"CAM": _cams(storage)[-1], "pseudo masks": storage.read_json("pseudo_masks/scores.json")}
    for what, folder in (("segmenter", "evaluation"), ("segmenter from full masks", "supervised/evaluation")):
        if storage.exists(f"{folder}/scores.json"):
            scored[what] = storage.read_json(f"{folder}/scores.json")
    return {what: scores["protocol"] for what, scores in scored.items()}


def _cams(storage: Storage) -> list[dict[str, Any]]:
    """The scores of every round's CAMs."""
    rounds = range(storage.read_json("config.json")["rounds"] + 1)
    return [storage.read_json(f"rounds/{index:02d}/cams/scores.json") for index in rounds]


def markdown(runs: Sequence[dict[Line, float | None]], names: Sequence[str]) -> str:
    """One row a number, one column a run, then mean and sample standard deviation."""
    rows = [f"| what | split | number | {' | '.join(names)} | mean | spread |", "|---" * (len(names) + 5) + "|"]
    for key in runs[0]:
        values = [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        mean = f"{statistics.mean(known):.3f}" if known else ""
        spread = f"{statistics.stdev(known):.3f}" if len(known) > 1 else ""
        cells = [*key, *("" if value is None else f"{value:.3f}" for value in values), mean, spread]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


Curve = dict[float, list[float]]
"""threshold -> mIoU of each run"""


def _curves(storages: Sequence[Storage]) -> dict[str, dict[str, Curve]]:
    """split -> name of the maps -> curve, at thresholds of whole steps."""
    curves: dict[str, dict[str, Curve]] = {}
    for storage in storages:
        for index, cams in enumerate(_cams(storage)):
            for split, score in cams["splits"].items():
                if "thresholds" not in score:
                    continue
                kinds = {"CAM": score["plain"]["miou"], "spread CAM": score["miou"]} if "plain" in score else None
                for kind, values in (kinds or {"CAM": score["miou"]}).items():
                    curve = curves.setdefault(split, {}).setdefault(f"{kind}, round {index}", {})
                    for threshold, value in zip(score["thresholds"], values, strict=True):
                        if value is not None and abs(threshold / _CURVE_STEP - round(threshold / _CURVE_STEP)) < 1e-6:
                            curve.setdefault(threshold, []).append(value)
    return curves


def curve_markdown(curves: dict[str, Curve], split: str) -> str:
    """mIoU by threshold, the mean over the runs; one row a threshold, one column a kind of maps and round."""
    thresholds = sorted({threshold for curve in curves.values() for threshold in curve})
    rows = [f"| threshold, {split} | {' | '.join(curves)} |", "|---" * (len(curves) + 1) + "|"]
    for threshold in thresholds:
        means = [f"{statistics.mean(curve[threshold]):.3f}" if threshold in curve else "" for curve in curves.values()]
        rows.append(f"| {threshold:.2f} | {' | '.join(means)} |")
    return "\n".join(rows)
