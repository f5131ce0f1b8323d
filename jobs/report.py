"""One self-contained HTML page that shows what a run did, how good it is, and what it looks like.

Reads:   the run's markers and result files; a few shards of manifest, sub-categories, CAMs and masks; a few images
Writes:  report/index.html (no network, no script); the same page, an overview picture and the scores in MLflow
Runs on: the driver, in bounded memory; made again on every call, from what is there
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cluster.storage import Storage
from cluster.tracking_client import safe_text
from jobs import report_page, report_sections, report_stages
from jobs.cut_tiles import has_tiles, open_tiles
from jobs.manifest import open_manifest
from jobs.protocol import protocol_text
from jobs.report_gallery import make_galleries
from jobs.report_numbers import RunNumbers, read_numbers
from jobs.report_pictures import Example, PictureReader, choose
from subcat_core.overlays import contact_sheet, to_png
from subcat_core.settings import Settings

if TYPE_CHECKING:
    from jobs.config import Experiment
    from jobs.context import StageContext

PAGE = "report/index.html"
_TEMPLATE = Path(__file__).with_name("templates") / "report.html"
_SECTIONS = (
    ("scores", "Scores"),
    ("examples", "Examples"),
    ("subcategories", "Sub-categories"),
    ("training", "Training"),
    ("stages", "Stages"),
    ("quarantine", "Quarantine"),
    ("reproduce", "Making it again"),
)


class ReportSettings(Settings):
    """How much the page shows."""

    num_examples: int = Field(default=12, ge=0, le=200)
    """Images with all their overlays."""
    num_worst: int = Field(default=4, ge=0, le=200)
    """How many of them are the worst ones."""
    num_candidates: int = Field(default=160, ge=1, le=10_000)
    """Images that are scored, each of pseudo masks and predictions, to choose the examples from."""
    panel_px: int = Field(default=240, ge=32, le=1024)
    """Long side of an overlay."""
    num_nearest: int = Field(default=5, ge=1, le=50)
    """Images a sub-category in the galleries."""
    gallery_rows: int = Field(default=50_000, ge=1)
    """Rows of a round that are searched for the images nearest to a centroid."""
    max_tiles: int = Field(default=1200, ge=1, le=20_000)
    """Gallery pictures on the whole page, about 4 KB each; past it, fewer a sub-category, then none of early rounds."""
    max_bad_images: int = Field(default=200, ge=0)
    """Quarantined images that are listed; the rest is counted."""


def run(context: StageContext) -> str:
    """Write the page and log it; returns its URI."""
    experiment = context.experiment
    with context.tracker.child("report") as child:
        numbers, examples, page = _make(context.storage, experiment, context.command)
        context.storage.write_bytes(PAGE, page.encode())
        child.log_text("report.html", page)
        if examples:
            child.log_image("images/examples.png", to_png(overview(examples)))
        context.tracker.log_metrics(headline_metrics(numbers))
        context.tracker.set_tags(protocol_tags(numbers))
    return context.storage.uri(PAGE)


def write_report(storage: Storage, experiment: Experiment, *, command: str = "") -> str:
    """Write the page of an output folder from what is there, finished or not; returns its URI.

    Raises ValueError where the folder has no manifest yet, StorageError where a file is broken.
    """
    _, _, page = _make(storage, experiment, command)
    storage.write_bytes(PAGE, page.encode())
    return storage.uri(PAGE)


def _make(storage: Storage, experiment: Experiment, command: str) -> tuple[RunNumbers, list[Example], str]:
    settings = experiment.report
    manifest = open_manifest(storage)
    numbers = read_numbers(storage, manifest, experiment.rounds, settings.max_bad_images)
    reader = PictureReader(storage, manifest, settings.panel_px)
    examples = choose_examples(reader, numbers, settings, range(experiment.rounds + 1))
    seen = open_tiles(storage) if has_tiles(storage) else manifest
    galleries = make_galleries(
        storage,
        numbers.subcategories,
        seen,
        num_nearest=settings.num_nearest,
        max_rows=settings.gallery_rows,
        max_tiles=settings.max_tiles,
    )
    sections = [
        report_page.scores_section(numbers),
        report_sections.examples_section(examples, numbers.classes),
        report_sections.subcategories_section(numbers, galleries),
        report_stages.training_section(numbers),
        report_stages.stages_section(numbers),
        report_sections.bad_images_section(numbers),
        report_sections.reproduce_section(numbers, safe_text(command), _safe(experiment.flattened())),
    ]
    head = report_page.header(experiment.name, numbers, safe_text(storage.uri())) + report_page.cards(numbers)
    return numbers, examples, fill_template(experiment.name, head, sections)


def choose_examples(
    reader: PictureReader, numbers: RunNumbers, settings: ReportSettings, rounds: Sequence[int]
) -> list[Example]:
    """A dozen images: two thirds from the pseudo masks, the rest from the predictions, typical ones first."""
    made = {kind: reader.candidates(kind, settings.num_candidates) for kind in ("pseudo_masks", "predictions")}
    num_predicted = settings.num_examples // 3 if made["pseudo_masks"] else settings.num_examples
    share = {"pseudo_masks": settings.num_examples - min(num_predicted, len(made["predictions"]))}
    share["predictions"] = settings.num_examples - share["pseudo_masks"]
    chosen = []
    for kind, candidates in made.items():
        num_worst = round(settings.num_worst * share[kind] / max(settings.num_examples, 1))
        chosen += choose(candidates, share[kind], num_worst, numbers.classes.num_classes)
    chosen.sort(key=lambda pair: pair[1])
    examples = [reader.example(candidate, rounds, is_worst) for candidate, is_worst in chosen]
    return [example for example in examples if example is not None]


def headline_metrics(numbers: RunNumbers) -> dict[str, float | None]:
    """The scores of the run's end, and its time, for its MLflow parent run: those by which runs are compared."""
    values: dict[str, float | None] = {}
    if numbers.final_round in numbers.cams:
        for split, score in numbers.cams[numbers.final_round]["splits"].items():
            curve = {"best": score["best"], "015": score["fixed"]} if "best" in score else {"argmax": score}
            values |= {f"final/cam_miou_{split}_{kind}": part["miou"] for kind, part in curve.items()}
    made = {"pseudo_mask": numbers.pseudo_masks, "segmenter": numbers.evaluation, "supervised": numbers.supervised}
    for name, scores in made.items():
        for split, score in ((scores or {}).get("splits") or {}).items():
            values[f"final/{name}_miou_{split}"] = score["miou"]
    for key in ("seconds", "gpu_hours"):
        values[f"total/{key}"] = sum(float(record.stats.get(key) or 0) for record in numbers.stages)
    return values


def protocol_tags(numbers: RunNumbers) -> dict[str, str]:
    """How each final score was taken, as tags of the MLflow parent run: compare numbers where these are the same."""
    made = {
        "cam": numbers.cams.get(numbers.final_round or 0),
        "pseudo_mask": numbers.pseudo_masks,
        "segmenter": numbers.evaluation,
        "supervised": numbers.supervised,
    }
    told = {name: (scores or {}).get("protocol") for name, scores in made.items()}
    return {f"protocol.{name}": protocol_text(protocol) for name, protocol in told.items() if protocol}


def overview(examples: Sequence[Example]) -> np.ndarray:
    """All examples as one picture, (H, W, 3) uint8: the first panel of each column."""
    rows = [[(column[0].caption, column[0].image) for column in example.columns] for example in examples]
    return contact_sheet(rows, side_px=150)


def fill_template(name: str, head: str, sections: Sequence[str], titles: Sequence[tuple[str, str]] = _SECTIONS) -> str:
    """The whole page. head and sections are HTML; empty sections are left out of the navigation too.

    titles: (anchor, title) of every section that there may be.
    """
    body = "".join(sections)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in titles if f'id="{anchor}"' in body)
    whole = (
        f"<header><div>{head}</div></header><nav><div>{links}</div></nav><main>{body}"
        "<footer>One file: pictures and style are inside, nothing is loaded from elsewhere.</footer></main>"
    )
    return string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=report_page.esc(name), body=whole)


def _safe(flattened: Mapping[str, str]) -> dict[str, str]:
    """Settings without user and password in URIs."""
    return {key: safe_text(value) for key, value in flattened.items()}
