"""`subcat results RUN RUN ...`: the scores of several runs of one config as Markdown tables, mean and spread.

Runs differ in rng_seed alone; docs/results.md holds what this prints. The spread is the sample standard deviation.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.storage import Storage
from jobs.protocol import protocol_markdown
from jobs.report_numbers import read_optional

Line = tuple[str, str, str]
"""(what, split, which number)"""
WALK_STEPS = {"before_walk": "CAM, before the walk", "before_crf": "+ random walk"}
"""Scores of the steps before a pseudo mask, in scores.json where there was a random walk: key -> name in tables."""
_CURVE_STEP = 0.05
_MAY_DIFFER = ("rng_seed", "output", "stream", "cluster", "tracking", "report")


def results_tables(outputs: list[str]) -> str:
    """The tables of the runs with these output folders. Raises ValueError for one that is not a finished run."""
    storages = [Storage(path) for path in outputs]
    missing = [storage.root for storage in storages if not storage.exists("config.json")]
    if missing:
        raise ValueError(f"not the output of a run: {', '.join(missing)}; give output folders of finished runs")
    _check_one_config(storages)
    seeds = [f"seed {storage.read_json('config.json')['rng_seed']}" for storage in storages]
    scores = markdown([scores_of_run(storage) for storage in storages], seeds)
    curves = "\n\n".join(curve_markdown(curves, split) for split, curves in _curves(storages).items())
    parts = [scores, protocol_markdown(_protocols(storages)), curves, rank_correlations(storages)]
    return "\n\n".join(part for part in parts if part)


def _check_one_config(storages: Sequence[Storage]) -> None:
    """ValueError where the runs differ in more than their seed, their folder and what changes no result."""
    flat = []
    for storage in storages:
        config = storage.read_json("config.json")
        flat.append({key: value for key, value in config.items() if key not in _MAY_DIFFER})
    for storage, config in zip(storages[1:], flat[1:], strict=True):
        different = sorted(key for key in {*config, *flat[0]} if config.get(key) != flat[0].get(key))
        if different:
            raise ValueError(
                f"{storage.root}: its config differs from that of {storages[0].root} in {', '.join(different)}; "
                "a mean is only of runs that differ in rng_seed"
            )


def same_images(tags: dict[str, Any], full: dict[str, Any]) -> bool:
    """Whether the yardstick learned from as many images as the segmenter from tags. Both: scores.json."""
    return bool(tags["protocol"].get("num_train_images") == full["protocol"].get("num_train_images"))


def scores_of_run(storage: Storage) -> dict[Line, float | None]:
    """Every mIoU of one finished run. Raises ValueError when the run is not finished."""
    if not storage.exists("evaluation/marker.json"):
        raise ValueError(f"{storage.root}: not a finished run (no evaluation/marker.json); run its config to the end")
    return scores_so_far(storage)


def scores_so_far(storage: Storage) -> dict[Line, float | None]:
    """Every mIoU that there is of a run, finished or not."""
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
    lines |= _choice_lines(read_optional(storage, "choice/choice.json"))
    for split, score in _splits(storage, "pseudo_masks/scores.json"):
        for key, name in WALK_STEPS.items():
            if key in score:
                lines[(name, split, "mIoU")] = score[key]["miou"]
        lines[("pseudo masks", split, "mIoU")] = score["miou"]
    for what, name in _self_training(storage).items():
        for split, score in _splits(storage, name):
            lines[(what, split, "mIoU")] = score["miou"]
    for split, score in _splits(storage, "evaluation/scores.json"):
        lines[("segmenter", split, "mIoU")] = score["miou"]
    for split, score in _splits(storage, "supervised/evaluation/scores.json"):
        lines[("segmenter from full masks", split, "mIoU")] = score["miou"]
        from_tags = lines.get(("segmenter", split, "mIoU"))
        ratio = from_tags / score["miou"] if from_tags is not None and score["miou"] else None
        full = storage.read_json("supervised/evaluation/scores.json")
        same = same_images(storage.read_json("evaluation/scores.json"), full)
        lines[("tags / full masks" if same else "tags / full masks of fewer images", split, "ratio")] = ratio
    return lines


def _splits(storage: Storage, name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(split, score) of a scores.json; nothing where there is none yet."""
    scores: dict[str, dict[str, Any]] = (read_optional(storage, name) or {}).get("splits") or {}
    return scores.items()


def _choice_lines(choice: dict[str, Any] | None) -> dict[Line, float | None]:
    """choice: choice.json, or None before the choice."""
    lines: dict[Line, float | None] = {}
    if choice is None:
        return lines
    for index, step in enumerate(choice["rounds"]):
        lines[(f"score without ground truth, round {index}", "sample of train", "score")] = step["score"]
        if step["threshold"] >= 0:  # below 0: no background, so none
            lines[(f"score without ground truth, round {index}", "sample of train", "its threshold")] = step[
                "threshold"
            ]
    lines[("masks are made from", "", "round")] = choice["round_index"]
    if choice.get("background_by") not in ("walk", "none"):
        key = "alpha" if choice["mask"]["background"] == "power" else "background_score"
        lines[("background of the masks", "", key)] = choice["mask"][key]
    return lines


def _self_training(storage: Storage) -> dict[str, str]:
    """Title -> scores.json of the masks and segmenters of self-training that come before the last segmenter."""
    settings = storage.read_json("config.json").get("self_training")
    names: dict[str, str] = {}
    for index in range(settings["rounds"] + 1 if settings else 0):
        if index:
            names[f"masks of self-training, round {index}"] = f"self_training/{index:02d}/masks/scores.json"
        if index < settings["rounds"]:
            names[f"segmenter of self-training, round {index}"] = f"self_training/{index:02d}/evaluation/scores.json"
    return names


def rank_correlations(storages: Sequence[Storage]) -> str:
    """How far the score without ground truth can be trusted, on the train split; empty where nothing has ground truth.

    Spearman's rank correlation with the true mIoU, over the thresholds of each curve (the mean over curves; none
    without background) and over rounds and runs, each at the threshold that the score picks; what those thresholds lose
    against the best ones; and how often, of two rounds of one run, the one that scores higher is better.
    """
    runs = [[cams for cams in _cams(storage) if _has_truth(cams)] for storage in storages]
    picked = [[_at_its_threshold(cams) for cams in run] for run in runs]
    curves = [cams for run in runs for cams in run if "best" in cams["splits"]["train"]]
    within = [_rank_correlation(cams["label_free"]["score"], cams["splits"]["train"]["miou"]) for cams in curves]
    losses = [cams["splits"]["train"]["best"]["miou"] - _at_its_threshold(cams)[1] for cams in curves]
    every = [pair for run in picked for pair in run]
    if not every:
        return ""
    pairs = [pair for run in picked for pair in itertools.combinations(run, 2)]
    agree = sum((one[0] - other[0]) * (one[1] - other[1]) > 0 for one, other in pairs)
    thresholds = (
        f" {statistics.mean(within):.2f} over the thresholds of a curve (those that it picks lose "
        f"{statistics.mean(losses):.3f} mIoU against the best ones, at most {max(losses):.3f}),"
        if losses
        else ""
    )
    across = f"{_rank_correlation([pair[0] for pair in every], [pair[1] for pair in every]):.2f}"
    return (
        f"The score without ground truth on train, {len(every)} rounds of {len(storages)} runs: rank correlation with "
        f"mIoU{thresholds} {across} over rounds and runs. Of two rounds of a run, the one that it prefers was better "
        f"in {agree} of {len(pairs)} pairs; a later round is kept only where it is clearly better."
    )


def _has_truth(cams: dict[str, Any]) -> bool:
    """Whether the maps of a round were scored with and without ground truth on train. cams: scores.json."""
    split = cams["splits"].get("train")
    if split is None or not cams["label_free"]["num_images"]:
        return False
    return None not in split["miou"] if "best" in split else split["miou"] is not None


def _at_its_threshold(cams: dict[str, Any]) -> tuple[float, float]:
    """(score without ground truth, mIoU on train) at the threshold of the highest score."""
    scores, miou = cams["label_free"]["score"], cams["splits"]["train"]["miou"]
    at = scores.index(max(scores))
    return scores[at], miou[at] if isinstance(miou, list) else miou


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where one of the two does not vary, or there are fewer than two pairs."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    """1-based ranks; equal values share the mean of theirs."""
    positions: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values), 1):
        positions.setdefault(value, []).append(rank)
    return [statistics.mean(positions[value]) for value in values]


def _protocols(storages: Sequence[Storage]) -> dict[str, dict[str, Any]]:
    """How each kind of number was taken; where runs differ, all of what they say."""
    merged: dict[str, dict[str, Any]] = {}
    for storage in storages:
        scored = {"CAM": _cams(storage)[-1], "pseudo masks": storage.read_json("pseudo_masks/scores.json")}
        scored |= {what: storage.read_json(name) for what, name in _self_training(storage).items()}
        for what, folder in (("segmenter", "evaluation"), ("segmenter from full masks", "supervised/evaluation")):
            if storage.exists(f"{folder}/scores.json"):
                scored[what] = storage.read_json(f"{folder}/scores.json")
        for what, scores in scored.items():
            kept = merged.setdefault(what, {})
            for key, value in scores["protocol"].items():
                told = kept.setdefault(key, value)
                if told != value and str(value) not in str(told):
                    kept[key] = f"{told}; {value}"
    return merged


def _cams(storage: Storage) -> list[dict[str, Any]]:
    """The scores of every round's CAMs, as far as the run has come."""
    rounds = range(storage.read_json("config.json")["rounds"] + 1)
    found = [read_optional(storage, f"rounds/{index:02d}/cams/scores.json") for index in rounds]
    return list(itertools.takewhile(bool, found))


def markdown(runs: Sequence[dict[Line, float | None]], names: Sequence[str]) -> str:
    """One row a number, one column a run, then mean and sample standard deviation."""
    rows = [f"| what | split | number | {' | '.join(names)} | mean | spread |", "|---" * (len(names) + 5) + "|"]
    for key in runs[0]:
        values = [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        mean = f"{statistics.mean(known):.3f}" if known else ""
        spread = f"{statistics.stdev(known):.3f}" if len(known) > 1 else ""
        cells = [*key, *(_cell(value) for value in values), mean, spread]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value: float | None) -> str:
    """Whole numbers, as the index of a round is, without decimals."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


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
