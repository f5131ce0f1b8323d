"""`subcat run CONFIG --dry-run`: what there is to do and what it will cost; no image is read, nothing is started."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cluster.storage import Storage, StorageError
from jobs import summary
from jobs.config import ConfigError, Experiment
from jobs.cost import CostAssumptions, DataCounts, StageCost
from jobs.cost_stages import stage_costs
from jobs.importers import open_source
from jobs.importers.problems import ProblemLog
from jobs.importers.rows import TRAIN, RowCounts, checked_rows
from jobs.manifest import Manifest, open_manifest

_MANIFEST_ROWS = 20_000  # read for the typical image
_SIZES = {"coco": (480, 640), "glas": (522, 775)}
_OTHER_SIZE = (375, 500)
_NUM_CLASSES = {"coco": 80}
_OTHER_NUM_CLASSES = 20


def parse_assumptions(
    num_train: int | None, num_val: int | None, tflops: float | None, assume: Iterable[str]
) -> CostAssumptions:
    """From the options of the command line. Raises ConfigError naming the option."""
    given = {"num_train": num_train, "num_val": num_val, "gpu_tflops": tflops}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for text in assume:
        key, equals, value = text.partition("=")
        if not equals or key not in CostAssumptions.model_fields:
            near = difflib.get_close_matches(key, CostAssumptions.model_fields, n=1)
            hint = f"; nearest: {near[0]}" if near else f" (valid: {', '.join(CostAssumptions.model_fields)})"
            raise ConfigError(f"--assume {text}: expected KEY=NUMBER with a known key{hint}")
        try:
            values[key] = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"--assume {text}: {value!r} is no number") from error
    try:
        return CostAssumptions.model_validate_json(json.dumps(values))
    except ValidationError as error:
        told = [f"{problem['loc'][0]} = {problem['input']}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"assumptions of --dry-run: {'; '.join(told)}") from error


def count_data(experiment: Experiment, assumptions: CostAssumptions) -> DataCounts:
    """From --num-train, a finished manifest, or the lists of prepare.source, in this order; no image is read.

    Raises ValueError where none of them is there.
    """
    source = experiment.prepare.source
    size = _SIZES.get(source.kind, _OTHER_SIZE)
    height = assumptions.image_height_px or size[0]
    width = assumptions.image_width_px or size[1]
    if assumptions.num_train is not None:
        names = source.classes
        num_classes = assumptions.num_classes or (len(names) if names else _NUM_CLASSES.get(source.kind, 0))
        num_val = assumptions.num_val or 0
        masks = {"train": assumptions.num_train_masks, "val": num_val}
        return DataCounts(
            "--num-train and --num-val",
            {"train": assumptions.num_train, "val": num_val},
            {split: number for split, number in masks.items() if number},
            num_classes or _OTHER_NUM_CLASSES,
            assumptions.labels_per_image,
            height,
            width,
        )
    try:
        manifest = open_manifest(Storage(experiment.output))
    except ValueError:
        return _count_lists(experiment, height, width)
    return _count_manifest(manifest, assumptions)


def _count_manifest(manifest: Manifest, assumptions: CostAssumptions) -> DataCounts:
    rows = manifest.rows(TRAIN, ["labels", "height_px", "width_px"], limit=_MANIFEST_ROWS).to_pydict()
    num_rows = max(len(rows["labels"]), 1)
    masks = {split: manifest.num_masks(split) for split in manifest.splits}
    return DataCounts(
        f"the manifest in {manifest.folder.uri()}",
        {split: manifest.num_rows(split) for split in manifest.splits},
        {split: number for split, number in masks.items() if number},
        manifest.classes.num_classes,
        sum(map(len, rows["labels"])) / num_rows,
        assumptions.image_height_px or round(sum(rows["height_px"]) / num_rows),
        assumptions.image_width_px or round(sum(rows["width_px"]) / num_rows),
    )


def _count_lists(experiment: Experiment, height: int, width: int) -> DataCounts:
    try:
        source = open_source(experiment.prepare.source)
        log, counts, num_tags = ProblemLog(), RowCounts(source.classes), 0
        for row in checked_rows(source, log, counts):
            num_tags += len(row.labels) if row.split == TRAIN else 0
    except (ValueError, StorageError) as error:
        raise ValueError(f"the lists cannot be read here ({error}); give --num-train and --num-val") from error
    splits = counts.to_json()
    if not splits.get(TRAIN):
        raise ValueError(f"{source.file}: split {TRAIN} has no sound image; give --num-train and --num-val")
    return DataCounts(
        f"the lists of {source.file}" + (", sound rows alone: `subcat validate` tells more" if log.has_errors else ""),
        {split: part["images"] for split, part in splits.items()},
        {split: part["masks"] for split, part in splits.items() if part["masks"]},
        source.classes.num_classes,
        num_tags / splits[TRAIN]["images"],
        height,
        width,
    )


def print_dry_run(experiment: Experiment, assumptions: CostAssumptions, console: Console | None = None) -> None:
    """Stages and what is done of them, what they will cost, what that stands on, and the resolved settings."""
    console = console or Console()
    summary.print_summary(Storage(experiment.output), experiment, console)
    try:
        counts = count_data(experiment, assumptions)
    except ValueError as error:
        console.print(f"no estimate of the cost: {error}", soft_wrap=True, highlight=False, markup=False)
    else:
        _print_costs(experiment, counts, assumptions, console)
    for key, value in experiment.flattened().items():
        console.print(f"{key} = {value}", soft_wrap=True, highlight=False, markup=False)


def _print_costs(experiment: Experiment, counts: DataCounts, assumptions: CostAssumptions, console: Console) -> None:
    costs = stage_costs(experiment, counts, assumptions)
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("estimate", no_wrap=True)
    for heading in ("images", "read", "written", "kept", "GPU h", "CPU h", "core h\nno GPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in costs:
        if cost.what is None:
            table.add_row(_name(cost), *([""] * 7))
            continue
        table.add_row(_name(cost), f"{cost.num_images:,}", *_cells([cost], assumptions))
    table.add_section()
    table.add_row("all stages", "", *_cells(costs, assumptions))
    console.print(table)
    lines = [f"  {_name(cost)}: {cost.what or 'no estimate'}" for cost in costs]
    splits = ", ".join(
        f"{number:,} {split} ({counts.num_masks.get(split, 0):,} with masks)"
        for split, number in counts.num_images.items()
    )
    lines.append(f"images: {splits}, from {counts.origin}")
    lines.append(
        f"typical image {counts.height_px} x {counts.width_px} px with {counts.labels_per_image:.2f} of "
        f"{counts.num_classes} classes"
    )
    lines.append(
        "GPU h: one GPU; multiply-adds x 2, training x 3 (frozen stages not taken off). CPU h: all else, on one core. "
        "Bytes before compression; in kept, checkpoints that stay."
    )
    named = {"num_train", "num_val", "num_train_masks", "num_classes", "labels_per_image"}
    rates = assumptions.model_dump(exclude={*named, "image_height_px", "image_width_px"})
    lines.append("assumed (--assume KEY=NUMBER): " + ", ".join(f"{key} = {value:g}" for key, value in rates.items()))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _name(cost: StageCost) -> str:
    step = cost.step
    return step.stage if step.round_index is None else f"{step.stage} {step.round_index}"


def _cells(costs: list[StageCost], assumptions: CostAssumptions) -> list[str]:
    sizes = [sum(getattr(cost, name) for cost in costs) for name in ("read_bytes", "written_bytes", "kept_bytes")]
    hours = [
        sum(cost.gpu_hours(assumptions) for cost in costs),
        sum(cost.cpu_hours() for cost in costs),
        sum(cost.hours_without_gpu(assumptions) for cost in costs),
    ]
    return [*map(format_bytes, sizes), *map(format_hours, hours)]


def format_bytes(number: float) -> str:
    """1,234,567 -> "1.2 MB"; nothing for 0."""
    if not number:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 9.95 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def format_hours(hours: float) -> str:
    """Two digits at least; nothing for 0."""
    if not hours:
        return ""
    return "< 0.01" if hours < 0.01 else f"{hours:,.0f}" if hours >= 99.5 else f"{hours:.2f}"
