"""The table at the end of a run: every stage with seconds, speed, memory and score, read back from the markers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import Storage
from jobs.config import Experiment
from jobs.pipeline import StagePlan, plan

GIB = 1024**3


def summary_rows(storage: Storage, experiment: Experiment) -> list[dict[str, Any]]:
    """One dict a step of the plan: stage, round, state ("complete" or "to do"), stats of the marker, score text."""
    rows = []
    for step in plan(experiment):
        if step.stage == "report":  # made again on every call, so it has no marker
            continue
        marker = (
            storage.read_json(f"{step.folder}/marker.json") if storage.exists(f"{step.folder}/marker.json") else None
        )
        stats = (marker or {}).get("stats", {})
        score = _score(storage, step, stats) if marker else ""
        state = "complete" if marker else "to do"
        rows.append({"stage": step.stage, "round": step.round_index, "state": state, "stats": stats, "score": score})
    return rows


def print_summary(storage: Storage, experiment: Experiment, console: Console | None = None) -> None:
    """Print the table. Peak memory is that of the stage's biggest worker; the driver's own is in the last column."""
    table = Table(title=f"{experiment.name}: {storage.root}")
    for heading, right in (
        ("stage", 0),
        ("round", 1),
        ("seconds", 1),
        ("images/s", 1),
        ("worker GiB", 1),
        ("driver GiB", 1),
    ):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_column("score", overflow="fold")
    for row in summary_rows(storage, experiment):
        stats = row["stats"]
        table.add_row(
            row["stage"],
            "" if row["round"] is None else str(row["round"]),
            _seconds(stats) or row["state"],
            f"{stats['images_per_s']:.1f}" if stats.get("images_per_s") else "",
            _gib(stats.get("peak_rss_bytes")),
            _gib(stats.get("driver_rss_bytes")),
            row["score"],
        )
    (console or Console()).print(table)


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
        table.add_row("all background, mIoU", _text(scores["baselines"]["all_background"][split]["miou"]))
        console.print(table)
    for key, value in scores["protocol"].items():
        console.print(f"{key}: {value}", highlight=False)


def _seconds(stats: dict[str, Any]) -> str:
    """With a + where an earlier, interrupted call had done a part of the stage."""
    return f"{stats['seconds']:.1f}{'+' if stats.get('resumed') else ''}" if "seconds" in stats else ""


def _gib(value: int | None) -> str:
    return f"{value / GIB:.2f}" if value else ""


def _score(storage: Storage, step: StagePlan, stats: dict[str, Any]) -> str:
    """The one thing a person wants to know of a stage."""
    if step.stage in ("make_cams", "make_pseudo_masks", "evaluate"):
        splits = storage.read_json(f"{step.folder}/scores.json")["splits"]
        what = {"make_cams": "CAM", "make_pseudo_masks": "pseudo-mask", "evaluate": "segmenter"}[step.stage]
        if not splits:
            return "no ground truth"
        return "\n".join(
            f"{what} mIoU {_miou(score)} on {split} ({score['num_images']})" for split, score in splits.items()
        )
    if step.stage == "train_classifier" and "map" in stats:
        return f"mAP {stats['map']:.3f}"
    if step.stage == "cluster_features":
        return f"{stats['num_passes']} passes, balance {stats['balance']:.2f}"
    if stats.get("num_bad"):
        return f"{stats['num_bad']} quarantined"
    return ""


def _miou(score: dict[str, Any]) -> str:
    if "best" not in score:
        return _text(score["miou"])
    best, fixed = score["best"], score["fixed"]
    return (
        f"{_text(best['miou'])} at {best['threshold']:.2f} (best), {_text(fixed['miou'])} at {fixed['threshold']:.2f}"
    )


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
