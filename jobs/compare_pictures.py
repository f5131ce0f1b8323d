"""The same images in several runs: which are shown, and their maps and masks, a column a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jobs.compare_runs import ComparedRun
from jobs.report_pictures import Candidate, Panel, PictureReader, choose

_SIDE_PX = 240
_NUM_CANDIDATES = 160
_MAX_SHARDS = 8
_KINDS = {"predictions": "predictions", "pseudo_masks": "pseudo masks"}

ByRun = dict[str, Candidate]
"""Name of the run -> the image in it."""


@dataclasses.dataclass(frozen=True)
class ComparedPicture:
    """An image in every run. columns: the image with its ground truth, then the panels of each run."""

    image_id: str
    labels: tuple[int, ...]
    told: str
    columns: list[list[Panel]]


def compared_pictures(runs: Sequence[ComparedRun], num_shown: int) -> tuple[list[ComparedPicture], str]:
    """At most num_shown images, and what they are or why there are none.

    Of masks that two runs or more have made of the same images: half those on which the runs differ most (by IoU, or
    by confidence without ground truth), half medians class by class. Else images that the runs have maps of.
    """
    if not num_shown:
        return [], "None was asked for."
    tables = {run.manifest.classes.names for run in runs if run.manifest}
    if len(tables) != 1:
        return [], "Pictures are shown of runs with the same classes."
    readers = {r.name: PictureReader(r.storage, r.manifest, _SIDE_PX) for r in runs if r.manifest}
    for kind, words in _KINDS.items():
        images = _with_masks(readers, kind)
        if images:
            picked = _picked(images, num_shown, len(next(iter(tables))))
            told = f"Images on which the {words} differ most between the runs, then typical ones."
            return _pictures(runs, readers, picked), told
    maps = _with_maps(runs, num_shown)
    if maps:
        return _pictures(runs, readers, maps), "No two runs have masks of the same images yet, so these are maps."
    return [], "No two runs have masks or maps of the same images."


def _with_masks(readers: Mapping[str, PictureReader], kind: str) -> list[ByRun]:
    """The images that every run with masks of this kind has one of; none where fewer than two runs have masks."""
    made = {name: {c.image_id: c for c in reader.candidates(kind, _NUM_CANDIDATES)} for name, reader in readers.items()}
    made = {name: candidates for name, candidates in made.items() if candidates}
    if len(made) < 2:
        return []
    shared = set.intersection(*(set(candidates) for candidates in made.values()))
    return [{name: candidates[image_id] for name, candidates in made.items()} for image_id in sorted(shared)]


def _picked(images: Sequence[ByRun], num_shown: int, num_classes: int) -> list[ByRun]:
    """Half of them where the runs' scores lie furthest apart, half typical ones of the first run."""
    ranked = sorted(images, key=lambda by_run: -_spread(by_run))
    most = [by_run for by_run in ranked[: (num_shown + 1) // 2] if _spread(by_run) > 0]
    rest = {_first(by_run).image_id: by_run for by_run in ranked[len(most) :]}
    typical = choose([_first(by_run) for by_run in rest.values()], num_shown - len(most), 0, num_classes)
    return most + [rest[candidate.image_id] for candidate, _ in typical]


def _spread(by_run: ByRun) -> float:
    scores = [candidate.score for candidate in by_run.values()]
    return max(scores) - min(scores)


def _first(by_run: ByRun) -> Candidate:
    return next(iter(by_run.values()))


def _with_maps(runs: Sequence[ComparedRun], num_shown: int) -> list[ByRun]:
    """Images of a few shards that were scored in the last round of the first run with maps; of one manifest only."""
    mapped = [run for run in runs if run.manifest and run.numbers and run.numbers.final_round is not None]
    if len(mapped) < 2 or len({run.manifest.fingerprint for run in mapped if run.manifest}) > 1:
        return []
    base = mapped[0]
    assert base.manifest is not None
    assert base.numbers is not None
    folder = f"rounds/{base.numbers.final_round:02d}/cams"
    split = "val" if "val" in base.manifest.splits else None
    shards = base.manifest.shard_names(split, with_masks=True) or base.manifest.shard_names(split)
    shards = [name for name in shards if base.storage.exists(f"{folder}/{name}.parquet")]
    shards = shards[:: -(-len(shards) // _MAX_SHARDS) or 1]
    share = -(-num_shown // len(shards)) if shards else 0
    found: list[ByRun] = []
    for name in shards:
        ids = set(base.storage.read_table(f"{folder}/{name}.parquet", columns=["image_id"])["image_id"].to_pylist())
        columns = ["image_id", "uri", "labels", "mask_uri"]
        rows = base.storage.read_table(f"manifest/{name}.parquet", columns=columns).to_pylist()
        rows = [row for row in rows if row["image_id"] in ids]
        for row in rows[:: -(-len(rows) // share) or 1][:share]:
            labels = tuple(row["labels"] or ())
            shown = Candidate("cams", name, row["image_id"], row["uri"], labels, row["mask_uri"], "", 0.0, False)
            found.append({run.name: shown for run in mapped})
    return found[:num_shown]


def _pictures(
    runs: Sequence[ComparedRun], readers: Mapping[str, PictureReader], images: Sequence[ByRun]
) -> list[ComparedPicture]:
    pictures = (_picture(runs, readers, by_run) for by_run in images)
    return [picture for picture in pictures if picture is not None]


def _picture(
    runs: Sequence[ComparedRun], readers: Mapping[str, PictureReader], by_run: ByRun
) -> ComparedPicture | None:
    """None where no run can read the image."""
    columns: dict[str, list[list[Panel]]] = {}
    for run in runs:
        if run.name in by_run and run.numbers is not None:
            final = run.numbers.final_round
            example = readers[run.name].example(by_run[run.name], [] if final is None else [final], False)
            if example is not None:
                maps = example.columns[1] if final is not None else []
                columns[run.name] = [example.columns[0], maps, *example.columns[-3:]]
    if not columns:
        return None
    image, _, _, _, truth = next(iter(columns.values()))
    used = [index for index in (1, 2, 3) if any(p.image is not None for of in columns.values() for p in of[index])]
    panels = [[*image, *(panel for panel in truth if panel.image is not None)]]
    for run in runs:
        of_run = [panel for index in used for panel in columns.get(run.name, [[]] * 4)[index]]
        told = [dataclasses.replace(panel, caption=f"{run.name}: {panel.caption}") for panel in of_run]
        panels.append(told or [Panel(f"{run.name}: not there", None)])
    first = _first(by_run)
    scores = "" if first.kind not in _KINDS else "IoU " if first.is_iou else "confidence "
    told_scores = " · ".join(f"{by_run[r.name].score:.2f}" if r.name in by_run else "–" for r in runs)
    return ComparedPicture(first.image_id, first.labels, scores and scores + told_scores, panels)
