"""The sections of the report on how the run went: trainings, and seconds, speed and memory of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.report_charts import sparkline
from jobs.report_numbers import RunNumbers, StageRecord
from jobs.report_page import NOTHING, esc, heat, number, section, swatch

_GIB = 1024**3
_MEMORY = {"peak_rss_bytes": "biggest worker, GiB", "driver_rss_bytes": "driver, GiB", "run_bytes": "whole run, GiB"}


def training_section(numbers: RunNumbers) -> str:
    """Loss and average precision of every training, a row each."""
    trained = [(f"classifier, round {index}", result) for index, result in sorted(numbers.classifiers.items())]
    if numbers.affinity:
        trained.append(("affinity net", numbers.affinity))
    if numbers.segmenter:
        trained.append(("segmenter", numbers.segmenter))
    if numbers.yardstick:
        trained.append(("segmenter, full masks", numbers.yardstick))
    if not trained:
        return ""
    rows = []
    for name, result in trained:
        history = result.get("history") or []
        losses = [epoch.get("loss") for epoch in history]
        last = next((loss for loss in reversed(losses) if loss is not None), None)
        mean_ap = (result.get("metrics") or {}).get("map")
        line = sparkline(losses, f"loss of the {name} by epoch")
        cells = f'<td class="n">{len(history)}</td><td>{line}</td><td class="n">{number(last)}</td>'
        rows.append(f'<tr><th>{esc(name)}</th>{cells}<td class="n">{number(mean_ap)}</td></tr>')
    heads = ("network", "epochs", "loss by epoch", "last loss", "mAP")
    head = "".join(
        f"<th>{name}</th>" if name in (heads[0], heads[2]) else f'<th class="n">{name}</th>' for name in heads
    )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    lead = "Each line has its own scale. mAP: mean average precision of the parent classes on the validation split."
    return section("training", "Training", body + _precision_table(numbers) + _weights(trained), lead)


def _weights(trained: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """What each training started from, the same account told once."""
    named: dict[str, list[str]] = {}
    for name, result in trained:
        if result.get("weights"):
            named.setdefault(result["weights"], []).append(name)
    return "".join(f'<p class="note">{esc(", ".join(names))}: {esc(text)}</p>' for text, names in named.items())


def _precision_table(numbers: RunNumbers) -> str:
    """Average precision by class and round."""
    metrics = {index: result.get("metrics") or {} for index, result in sorted(numbers.classifiers.items())}
    if not any("ap/" in key for values in metrics.values() for key in values):
        return ""
    head = "".join(f'<th class="n">round {index}</th>' for index in metrics)
    rows = []
    for class_index, name in enumerate(numbers.classes.names):
        cells = "".join(heat(values.get(f"ap/{class_index}")) for values in metrics.values())
        rows.append(f"<tr><th>{swatch(numbers.classes, class_index + 1)}{esc(name)}</th>{cells}</tr>")
    return (
        "<details><summary>Average precision by class</summary>"
        f"<table><thead><tr><th>class</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def stages_section(numbers: RunNumbers) -> str:
    """Seconds, speed and memory of every stage."""
    longest = max((float(record.stats.get("seconds") or 0) for record in numbers.stages), default=0.0) or 1.0
    rows: list[str] = []
    group: int | None = None
    for record in numbers.stages:
        if record.round_index != group:
            group = record.round_index
            title = "after the rounds" if group is None else f"round {group}"
            rows.append(f'<tr class="group"><th colspan="8">{title}</th></tr>')
        rows.append(_stage_row(record, longest))
    total = sum(float(record.stats.get("seconds") or 0) for record in numbers.stages)
    peaks = [max((record.stats.get(key) or 0 for record in numbers.stages), default=0) for key in _MEMORY]
    ends = "".join(f'<td class="n">{_gib(peak)}</td>' for peak in peaks)
    rows.append(f'<tr class="sum"><th>all</th><td class="n">{total:,.1f}</td><td></td><td></td><td></td>{ends}</tr>')
    names = ("stage", "seconds", "", "images", "images/s", *_MEMORY.values())
    head = "".join(
        f"<th>{name}</th>" if index in (0, 2) else f'<th class="n">{name}</th>' for index, name in enumerate(names)
    )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    lead = (
        "Wall seconds of the stage that made the output; resident memory at its peak, last of all processes of the "
        "run on the driver's machine together."
    )
    return section("stages", "Stages", body, lead)


def _stage_row(record: StageRecord, longest: float) -> str:
    stats = record.stats
    seconds = float(stats.get("seconds") or 0)
    num_images, speed = stats.get("num_images"), stats.get("images_per_s")
    cells = [
        f'<td class="n">{seconds:,.1f}</td><td class="time"><i style="--v:{seconds / longest:.3f}"></i></td>',
        f'<td class="n">{NOTHING if num_images is None else format(num_images, ",")}</td>',
        f'<td class="n">{number(speed, 1)}</td>',
        *(f'<td class="n">{_gib(stats.get(key))}</td>' for key in _MEMORY),
    ]
    return f"<tr><th>{esc(_stage_name(record.stage))}</th>{''.join(cells)}</tr>"


def _stage_name(stage: str) -> str:
    return stage.replace("_", " ").replace("cams", "CAMs")


def _gib(value: int | None) -> str:
    return f"{value / _GIB:.2f}" if value else NOTHING
