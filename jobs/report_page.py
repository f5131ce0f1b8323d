"""The sections of the report as HTML: from numbers and pictures to text, with no reading and no choosing of its own."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report_charts import Curve, curve_chart
from jobs.report_numbers import RunNumbers
from subcat_core.classes import ClassTable

_GIB = 1024**3
NOTHING = "–"


def esc(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def section(anchor: str, title: str, body: str, lead: str = "") -> str:
    """A section with a heading that the page's navigation points at."""
    note = f'<p class="note">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{note}{body}</section>'


def swatch(classes: ClassTable, class_id: int) -> str:
    """The colour of a class in masks."""
    red, green, blue = classes.palette[class_id]
    return f'<i style="background:rgb({red},{green},{blue})"></i>'


def chips(classes: ClassTable, class_indices: Sequence[int]) -> str:
    """Names of classes beside their colours."""
    return "".join(
        f'<span class="chip">{swatch(classes, index + 1)}{esc(classes.names[index])}</span>' for index in class_indices
    )


def header(name: str, numbers: RunNumbers, output: str) -> str:
    """Title, where the output is, when it was made, and the classes."""
    finished = max((record.finished_at for record in numbers.stages), default="")
    when = f"finished {esc(finished.replace('T', ' ').replace('+00:00', ' UTC'))} · " if finished else ""
    shown = chips(numbers.classes, range(min(numbers.classes.num_classes, 40)))
    more = numbers.classes.num_classes - 40
    rest = f'<span class="chip">and {more} more</span>' if more > 0 else ""
    return (
        f'<p class="eyebrow">Subcat report</p><h1>{esc(name)}</h1>'
        f'<p class="soft">{when}<code>{esc(output)}</code></p><div class="chips">{shown}{rest}</div>'
    )


def cards(numbers: RunNumbers) -> str:
    """The headline numbers, each with what it was taken on."""
    made = []
    for score, title in ((numbers.evaluation, "Segmenter"), (numbers.pseudo_masks, "Pseudo masks")):
        for split, of_split in ((score or {}).get("splits") or {}).items():
            extra = f"pixel accuracy {number(of_split.get('pixel_accuracy'))}"
            full = ((numbers.supervised or {}).get("splits") or {}).get(split) or {}
            if title == "Segmenter" and full.get("miou") and of_split["miou"] is not None:
                extra = f"{of_split['miou'] / full['miou']:.0%} of the {number(full['miou'])} with full masks"
            told = f"{split}, {of_split['num_images']} images · {extra}"
            made.append(_card(f"{title} mIoU", number(of_split["miou"]), told, True))
    last = numbers.final_round
    if last in numbers.cams:
        for split, of_split in numbers.cams[last]["splits"].items():
            if "best" not in of_split:
                told = f"{split}, round {last}, largest map"
                made.append(_card("CAM mIoU", number(of_split["miou"]), told, True))
                continue
            best, fixed = of_split["best"], of_split["fixed"]
            at_fixed = f"{number(fixed['miou'])} at {fixed['threshold']:g}"
            told = f"{split}, round {last}, best threshold {best['threshold']:.2f}; {at_fixed}"
            made.append(_card("CAM mIoU", number(best["miou"]), told, True))
    total = sum(numbers.num_images.values())
    splits = ", ".join(f"{count:,} {split}" for split, count in numbers.num_images.items())
    made.append(_card("Images", f"{total:,}", f"{splits} · {sum(numbers.num_masks.values()):,} with ground truth"))
    seconds = sum(float(record.stats.get("seconds") or 0) for record in numbers.stages)
    num_rounds = len({record.round_index for record in numbers.stages if record.round_index is not None})
    told = f"{len(numbers.stages)} stages, {num_rounds} round{'' if num_rounds == 1 else 's'}"
    made.append(_card("Time", duration(seconds), told))
    return f'<div class="cards">{"".join(made)}</div>'


def _card(title: str, value: str, told: str, lead: bool = False) -> str:
    kind = "card lead" if lead else "card"
    return f'<div class="{kind}"><span>{esc(title)}</span><b>{value}</b><small>{esc(told)}</small></div>'


def duration(seconds: float) -> str:
    """`2 h 05 min`, `7 min 12 s` or `8.4 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"


def scores_section(numbers: RunNumbers) -> str:
    """Curves, the table by round, IoU by class, and the protocol of each number."""
    splits = sorted({split for scores in numbers.cams.values() for split in scores["splits"]})
    curved = sorted({s for scores in numbers.cams.values() for s, v in scores["splits"].items() if "best" in v})
    parts = [_curves(numbers, split) for split in curved]
    if not splits and not _has_splits(numbers.pseudo_masks) and not _has_splits(numbers.evaluation):
        parts.append('<p class="soft">No image of this run has ground truth, so there is nothing to score.</p>')
    parts += [_choice(numbers), _class_table(numbers), _protocols(numbers)]
    lead = "Intersection over union with annotated masks, background included; an image without a mask is not scored."
    return section("scores", "Scores", "".join(parts), lead)


def _choice(numbers: RunNumbers) -> str:
    """Which round the masks come from, and by what."""
    if numbers.choice is None:
        return ""
    rows = []
    for index, step in enumerate(numbers.choice["rounds"]):
        compared = ""
        if index:
            verdict = "clearly better" if step["clearly_better"] else "not clearly better"
            difference = f"{step['difference']:+.4f} ± {step['standard_error']:.4f}"
            compared = f"{difference} against round {step['compared_with']}: {verdict}"
        threshold = f"{step['threshold']:.2f}" if step["threshold"] >= 0 else ""  # below 0: no background, so none
        rows.append([f"round {index}", compared, number(step["score"], 4), threshold])
    for step in numbers.choice.get("background") or []:
        value = step["alpha"] if numbers.choice["mask"]["background"] == "power" else step["background_score"]
        name = "alpha" if numbers.choice["mask"]["background"] == "power" else "background"
        rows.append([f"{name} {value:.2f}", "masks of a part of the sample", number(step["score"], 4), ""])
    table_ = table(["", "", "score", "threshold"], rows, text_columns=2)
    asked = "" if numbers.choice["round_by"] == "label_free" else ", the last one, as the config asks"
    told = (
        f'<p class="note">Masks are made from round {numbers.choice["round_index"]}{asked}. No ground truth was '
        "looked at; the score asks whether maps decide, and whether their regions are regions of the picture, on a "
        "sample of the train split.</p>"
    )
    return f"<h3>The choice, without ground truth</h3>{table_}{told}"


def _has_splits(scores: Mapping[str, Any] | None) -> bool:
    return bool(scores and scores.get("splits"))


def _curves(numbers: RunNumbers, split: str) -> str:
    curves, rows = [], []
    for index, scores in sorted(numbers.cams.items()):
        of_split = scores["splits"].get(split)
        if of_split is None:
            continue
        places = of_split["thresholds"]
        kinds = {f"round {index}": of_split}
        if "plain" in of_split:  # before the maps were spread by affinity
            kinds[f"{index}, plain"] = of_split["plain"]
        for name, kind in kinds.items():
            best, fixed = kind["best"], kind["fixed"]
            curves.append(Curve(name, places, kind["miou"], _nearest(places, best["threshold"])))
            rows.append([name, number(fixed["miou"]), number(best["miou"]), f"{best['threshold']:.2f}"])
    num_images = [s["splits"][split]["num_images"] for s in numbers.cams.values() if split in s["splits"]][-1]
    fixed = next(s["splits"][split]["fixed"]["threshold"] for s in numbers.cams.values() if split in s["splits"])
    chart = curve_chart(curves, across="threshold", up="CAM mIoU", rule=fixed)
    table_ = table(["CAM mIoU", f"at {fixed:g}", "at the best", "threshold"], rows)
    told = (
        '<p class="note">The best threshold is picked on these very images, so it is an upper bound, no forecast.</p>'
    )
    title = f"CAMs on {esc(split)} ({num_images} images), mIoU by threshold"
    return f'<h3>{title}</h3><div class="split"><div>{chart}</div><div>{table_}{told}</div></div>'


def _nearest(places: Sequence[float], wanted: float) -> int:
    return min(range(len(places)), key=lambda index: abs(places[index] - wanted))


def _class_table(numbers: RunNumbers) -> str:
    """IoU by class, a column a scored thing; the mean in the last row."""
    columns: list[tuple[str, dict[str, Any]]] = []
    for index, scores in sorted(numbers.cams.items()):
        for s, v in scores["splits"].items():
            columns.append((f"CAM, round {index}<br>{esc(s)}{', best' if 'best' in v else ''}", v.get("best", v)))
    for title, scores_ in _made_masks(numbers):
        columns += [(f"{title}<br>{esc(s)}", v) for s, v in ((scores_ or {}).get("splits") or {}).items()]
    for name, baseline in ((numbers.evaluation or {}).get("baselines") or {}).items():
        title = esc(name.replace("all_", "All ", 1))
        columns += [(f"{title}<br>{esc(s)}", v) for s, v in baseline.items()]
    if not columns:
        return ""
    names = ("background", *numbers.classes.names)
    head = "".join(f'<th class="n">{title}</th>' for title, _ in columns)
    body = []
    for class_id, name in enumerate(names):
        cells = "".join(heat(score["iou"][class_id]) for _, score in columns)
        body.append(f"<tr><th>{swatch(numbers.classes, class_id)}{esc(name)}</th>{cells}</tr>")
    means = "".join(heat(score["miou"]) for _, score in columns)
    body.append(f'<tr class="sum"><th>mIoU</th>{means}</tr>')
    return (
        f'<h3>IoU by class</h3><div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _made_masks(numbers: RunNumbers) -> list[tuple[str, dict[str, Any] | None]]:
    """Titles and scores of what is scored as masks."""
    made = [("Pseudo masks", numbers.pseudo_masks), *numbers.self_training.items(), ("Segmenter", numbers.evaluation)]
    return [*made, ("Segmenter, full masks", numbers.supervised)]


def heat(value: float | None) -> str:
    if value is None:
        return f'<td class="n">{NOTHING}</td>'
    return f'<td class="heat" style="--v:{min(max(value, 0.0), 1.0):.3f}"><span>{value:.3f}</span></td>'


def _protocols(numbers: RunNumbers) -> str:
    scored = [("CAMs", numbers.cams.get(numbers.final_round or 0))]
    scored += _made_masks(numbers)
    parts = []
    for title, scores in scored:
        if scores and scores.get("protocol"):
            parts.append(f"<div><b>{title}</b>{definitions(scores['protocol'])}</div>")
    return f'<h3>How these numbers were taken</h3><div class="columns">{"".join(parts)}</div>' if parts else ""


def definitions(values: Mapping[str, Any]) -> str:
    """Keys and values as a definition list; nested values as JSON."""
    rows = [f"<dt>{esc(key.replace('_', ' '))}</dt><dd>{esc(_plain(value))}</dd>" for key, value in values.items()]
    return f'<dl class="protocol">{"".join(rows)}</dl>'


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(inner)}" for key, inner in value.items())
    if value is None:
        return "not set"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return value if isinstance(value, str) else json.dumps(value)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, kind: str = "") -> str:
    """A table of escaped text; all but the first `text_columns` columns are aligned as numbers."""
    kinds = ["" if index < text_columns else ' class="n"' for index in range(len(heads))]
    head = "".join(f"<th{kind_}>{esc(text)}</th>" for text, kind_ in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind_}>{esc(text)}</td>' for text, kind_ in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    name = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
