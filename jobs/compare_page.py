"""The page of a comparison: cards, a chart over rounds, the tables, and the same pictures in every run."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.tracking_client import safe_text
from jobs.compare_pictures import ComparedPicture, compared_pictures
from jobs.compare_runs import MISSING, ComparedRun, Comparison, Row, shown
from jobs.report import fill_template
from jobs.report_charts import Curve, curve_chart
from jobs.report_page import chips, esc, number, section
from jobs.report_sections import panel_figure
from subcat_core.classes import ClassTable

_SECTIONS = (
    ("rounds", "Rounds"),
    ("results", "Results"),
    ("settings", "Settings"),
    ("protocol", "Protocol"),
    ("examples", "Examples"),
    ("time", "Time"),
)
_MAX_LABEL = 12
_AXIS_STEP = 0.1


def comparison_page(compared: Comparison, num_examples: int) -> str:
    """One self-contained page, in the report's style. num_examples: pictures at most."""
    pictures, told = compared_pictures(compared.runs, num_examples)
    title = " · ".join(run.name for run in compared.runs)
    sections = [
        _rounds_section(compared.runs),
        _results_section(compared),
        _settings_section(compared),
        _protocol_section(compared),
        _examples_section(compared.runs, pictures, told),
        _time_section(compared),
    ]
    return fill_template(title, _head(title, compared), sections, _SECTIONS)


def _head(title: str, compared: Comparison) -> str:
    rows = "".join(
        f"<dt>{esc(run.name)}</dt><dd><code>{esc(safe_text(run.storage.uri()))}</code> · {esc(run.state)}</dd>"
        for run in compared.runs
    )
    notes = "".join(f'<p><span class="badge worst">note</span> {esc(note)}</p>' for note in compared.notes)
    return (
        f'<p class="eyebrow">Subcat comparison</p><h1>{esc(title)}</h1><dl class="protocol">{rows}</dl>{notes}'
        f'<div class="cards">{"".join(_card(run) for run in compared.runs)}</div>'
    )


def _card(run: ComparedRun) -> str:
    """The last score that a run has come to."""
    what, value, told = "no score yet", MISSING, run.state
    if run.numbers is not None:
        final = run.numbers.final_round
        made = [
            ("segmenter mIoU", run.numbers.evaluation),
            ("pseudo mask mIoU", run.numbers.pseudo_masks),
            (f"CAM mIoU, round {final}", run.numbers.cams.get(final) if final is not None else None),
        ]
        for title, scores in made:
            splits = (scores or {}).get("splits") or {}
            if splits:
                split = "val" if "val" in splits else next(iter(splits))
                score = splits[split].get("best", splits[split])
                what, value = title, number(score["miou"])
                told = f"{split}, {splits[split]['num_images']} images" + (
                    ", best threshold" * ("best" in splits[split])
                )
                break
    small = f"<small>{esc(what)} · {esc(told)}</small>"
    return f'<div class="card lead"><span>{esc(run.name)}</span><b>{value}</b>{small}</div>'


def _rounds_section(runs: Sequence[ComparedRun]) -> str:
    """CAM mIoU by round, a chart a kind of maps and split, one line a run."""
    kinds: dict[tuple[str, str], list[list[float | None]]] = {}
    num_rounds = max((len(run.numbers.cams) for run in runs if run.numbers), default=0)
    for place, run in enumerate(runs):
        for index, scores in sorted(run.numbers.cams.items()) if run.numbers else []:
            for split, score in scores["splits"].items():
                curves = {"spread CAMs": score, "CAMs": score["plain"]} if "plain" in score else {"CAMs": score}
                for kind, curve in curves.items():
                    lines = kinds.setdefault((kind, split), [[None] * num_rounds for _ in runs])
                    lines[place][index] = curve.get("best", curve)["miou"]
    if not kinds:
        return ""
    charts = [_round_chart(runs, kind, split, lines) for (kind, split), lines in sorted(kinds.items())]
    lead = "The best threshold of each round, where there is one; it is picked on these images: an upper bound."
    pairs = "".join(f'<div class="split even">{"".join(charts[i : i + 2])}</div>' for i in range(0, len(charts), 2))
    return section("rounds", "Rounds", pairs, lead)


def _round_chart(runs: Sequence[ComparedRun], kind: str, split: str, lines: list[list[float | None]]) -> str:
    num_rounds = len(lines[0])
    last = max(num_rounds - 1, 1)
    places = [index / last for index in range(num_rounds)]
    curves = [
        Curve(_label(run.name), places, values, _last_known(values)) for run, values in zip(runs, lines, strict=True)
    ]
    known = [value for values in lines for value in values if value is not None]
    low = max(0.0, int((min(known, default=0.0) - 0.02) / _AXIS_STEP) * _AXIS_STEP)
    ticks = {place: str(index) for index, place in enumerate(places)}
    chart = curve_chart(curves, across="round", up=f"mIoU of {kind}, {split}", ticks=ticks, low=low, of="run")
    return f"<div><h3>mIoU of {esc(kind)}, {esc(split)}</h3>{chart}</div>"


def _label(name: str) -> str:
    return name if len(name) <= _MAX_LABEL else f"…{name[1 - _MAX_LABEL :]}"


def _last_known(values: Sequence[float | None]) -> int | None:
    return max((index for index, value in enumerate(values) if value is not None), default=None)


def _results_section(compared: Comparison) -> str:
    if not compared.results:
        return section("results", "Results", '<p class="soft">None of these runs has a score yet.</p>')
    first = esc(compared.runs[0].name)
    lead = (
        f"Intersection over union with annotated masks; in brackets the difference to {first}. Runs with other seeds "
        "differ too: <code>subcat results</code> tells by how much."
    )
    return section("results", "Results", _table(compared.runs, compared.results, numbers=True), lead)


def _settings_section(compared: Comparison) -> str:
    parts = []
    if compared.settings:
        parts.append(_table(compared.runs, compared.settings))
    else:
        parts.append('<p class="soft">No setting that changes a result differs.</p>')
    if compared.other_settings:
        inner = _table(compared.runs, compared.other_settings)
        parts.append(
            f"<details><summary>Where and how fast ({len(compared.other_settings)})</summary>{inner}</details>"
        )
    return section("settings", "Settings", "".join(parts), "Only those that differ.")


def _protocol_section(compared: Comparison) -> str:
    if not compared.protocols:
        return ""
    lead = "Scores that were taken in other ways are not better or worse by their numbers alone."
    return section("protocol", "Protocol", _table(compared.runs, compared.protocols), lead)


def _time_section(compared: Comparison) -> str:
    if not compared.times:
        return ""
    lead = "Wall time of each stage on the machine that it ran on; +: an interrupted call had done a part of it."
    return section("time", "Time", _table(compared.runs, compared.times, numbers=True), lead)


def _table(runs: Sequence[ComparedRun], rows: Sequence[Row], numbers: bool = False) -> str:
    kind = ' class="n"' if numbers else ' class="wrap"'
    head = "".join(f"<th{kind}>{esc(run.name)}</th>" for run in runs)
    body = []
    for row in rows:
        differences = row.differences or [None] * len(row.cells)
        texts = [shown(cell, by) for cell, by in zip(row.cells, differences, strict=True)]
        body.append(f"<tr><th>{esc(row.what)}</th>{''.join(f'<td{kind}>{esc(text)}</td>' for text in texts)}</tr>")
    head = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'


def _examples_section(runs: Sequence[ComparedRun], pictures: Sequence[ComparedPicture], told: str) -> str:
    if not pictures:
        return section("examples", "Examples", f'<p class="soft">{esc(told)}</p>')
    classes = next(run.manifest.classes for run in runs if run.manifest)
    rows = "".join(_article(picture, classes) for picture in pictures)
    return section("examples", "Examples", rows, esc(told))


def _article(picture: ComparedPicture, classes: ClassTable) -> str:
    badge = f'<span class="badge">{esc(picture.told)}</span>' if picture.told else ""
    columns = "".join(f"<div>{''.join(panel_figure(panel) for panel in column)}</div>" for column in picture.columns)
    title = f"<code>{esc(picture.image_id)}</code>{badge}{chips(classes, picture.labels)}"
    panels = f'<div class="panels" style="--n:{len(picture.columns)}">{columns}</div>'
    return f'<article class="example"><p>{title}</p>{panels}</article>'
