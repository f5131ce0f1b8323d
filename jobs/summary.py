"""The tables at the end of a run: every stage with seconds, speed and memory, every score; read from the markers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import Storage
from jobs.config import Experiment
from jobs.pipeline import StagePlan, plan
from jobs.results import WALK_STEPS

GIB = 1024**3


def summary_rows(storage: Storage, experiment: Experiment) -> list[dict[str, Any]]:
    """One dict a step of the plan: stage, round, state ("complete" or "to do"), stats of the marker, what it found."""
    rows = []
    for step in plan(experiment):
        if step.stage == "report":  # made again on every call, so it has no marker
            continue
        name = f"{step.folder}/marker.json"
        marker = storage.read_json(name) if storage.exists(name) else None
        stats = (marker or {}).get("stats", {})
        state = "complete" if marker else "to do"
        rows.append({"step": step, "state": state, "stats": stats, "found": _found(step, stats)})
    return rows


def print_summary(storage: Storage, experiment: Experiment, console: Console | None = None) -> None:
    """Print two tables that fit 80 columns: what each stage took, and every score that there is.

    Memory is the peak of the largest worker of the stage, and of all processes of the run on this machine together.
    """
    console = console or Console()
    console.print(f"{experiment.name}: {storage.root}", soft_wrap=True, highlight=False)
    rows = summary_rows(storage, experiment)
    table = _table("stage", *_RIGHT[:4])
    table.add_column("", no_wrap=True)
    for row in rows:
        stats = row["stats"]
        table.add_row(
            _name(row["step"]),
            _seconds(stats) or row["state"],
            f"{stats['images_per_s']:.1f}" if stats.get("images_per_s") else "",
            _gib(stats.get("peak_rss_bytes")),
            _gib(stats.get("run_bytes")),
            row["found"],
        )
    console.print(table)
    scores = [score for row in rows if row["state"] == "complete" for score in _scores(storage, row["step"])]
    if not scores:
        return
    table = _table("score", "split", "images", "mIoU", "threshold")
    for cells in scores:
        table.add_row(*cells)
    console.print(table)


_RIGHT = ("seconds", "images/s", "worker GiB", "run GiB")


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        left = heading in ("stage", "score", "split")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


def _name(step: StagePlan) -> str:
    return step.stage if step.round_index is None else f"{step.stage} {step.round_index}"


def print_scores(scores: dict[str, Any], class_names: tuple[str, ...], console: Console | None = None) -> None:
    """Print scores.json of an evaluation: each split's numbers by class, and the protocol they were taken by."""
    console = console or Console()
    for split, score in scores["splits"].items():
        table = Table(title=f"{split}: {score['num_images']} images")
        table.add_column("class")
        table.add_column("IoU", justify="right")
        for name, value in zip(("background", *class_names), score["iou"], strict=True):
            table.add_row(name, _text(value))
        table.add_section()
        table.add_row("mIoU", _text(score["miou"]))
        table.add_row("pixel accuracy", _text(score["pixel_accuracy"]))
        for name, baseline in scores["baselines"].items():
            table.add_row(f"{name.replace('all_', 'all ', 1)}, mIoU", _text(baseline[split]["miou"]))
        console.print(table)
    for key, value in scores["protocol"].items():
        console.print(f"{key}: {value}", highlight=False)


def _seconds(stats: dict[str, Any]) -> str:
    """With a + where an earlier, interrupted call had done a part of the stage."""
    return f"{stats['seconds']:.1f}{'+' if stats.get('resumed') else ''}" if "seconds" in stats else ""


def _gib(value: int | None) -> str:
    return f"{value / GIB:.2f}" if value else ""


def _found(step: StagePlan, stats: dict[str, Any]) -> str:
    """The one thing a person wants to know of a stage that has no score."""
    texts = []
    if step.stage == "train_classifier" and "map" in stats:
        texts.append(f"mAP {stats['map']:.3f}")
    if step.stage == "cluster_features" and stats:
        texts.append(f"{stats['num_passes']} passes" + ("" if stats.get("converged", True) else ", not converged"))
    if step.stage == "choose_round" and stats:
        texts.append(f"round {stats['round']}")
    if stats.get("num_bad"):
        texts.append(f"{stats['num_bad']} bad")
    return ", ".join(texts)


def _scores(storage: Storage, step: StagePlan) -> list[tuple[str, str, str, str, str]]:
    """(what, split, images, mIoU, threshold) of a complete step that is scored."""
    of_round = "" if step.round_index is None else f", self-training {step.round_index}"
    names = {
        "make_cams": f"CAM, round {step.round_index}",
        "make_pseudo_masks": "pseudo masks",
        "evaluate": f"segmenter{of_round}",
        "predict_train": f"masks{of_round}",
        "evaluate_supervised": "segmenter, full masks",
    }
    if step.stage not in names:
        return []
    scores = storage.read_json(f"{step.folder}/scores.json")
    rows = []
    for split, score in scores["splits"].items():
        name, num_images = names[step.stage], str(score["num_images"])
        for key, before in WALK_STEPS.items():
            if key in score:
                rows.append((before, split, num_images, _text(score[key]["miou"]), ""))
        curves = [(f"{name}, plain", score["plain"]), (name, score)] if "plain" in score else [(name, score)]
        for what, curve in curves:
            if "best" not in curve:
                rows.append((what, split, num_images, _text(curve["miou"]), ""))
                continue
            for kind, remark in (("fixed", ""), ("best", " (best)")):
                part = curve[kind]
                rows.append((what, split, num_images, _text(part["miou"]), f"{part['threshold']:.2f}{remark}"))
        if step.stage == "evaluate" and step.round_index is None:
            for key, baseline in scores["baselines"].items():
                miou = _text(baseline[split]["miou"])
                rows.append((key.replace("all_", "all ", 1), split, str(score["num_images"]), miou, ""))
    return rows


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
