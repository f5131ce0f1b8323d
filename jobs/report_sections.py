"""The sections of the report that show pictures, bad images and how to make it all again."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report_charts import stacked_bar
from jobs.report_gallery import ClusterTiles, Gallery
from jobs.report_numbers import RunNumbers
from jobs.report_page import chips, definitions, esc, number, section, swatch, table
from jobs.report_pictures import Example, Panel
from subcat_core.classes import ClassTable
from subcat_core.overlays import data_uri, to_jpeg

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "faiss-gpu",
    "faiss-cpu",
    "numpy",
    "pyarrow",
    "numba",
    "Pillow",
    "mlflow",
)


def examples_section(examples: Sequence[Example], classes: ClassTable) -> str:
    """Image | CAM by round | pseudo mask | prediction | ground truth, an image a row."""
    if not examples:
        return section(
            "examples", "Examples", '<p class="soft">No mask has been made yet, so there is nothing to show.</p>'
        )
    used = [
        index
        for index in range(len(examples[0].columns))
        if any(p.image is not None for e in examples for p in e.columns[index])
    ]
    rows = "".join(_example(example, used, classes) for example in examples)
    hidden = {
        column[0].caption
        for column in (examples[0].columns[i] for i in range(len(examples[0].columns)) if i not in used)
    }
    told = f" Not there for any of them: {esc(', '.join(sorted(hidden)))}." if hidden else ""
    lead = (
        "Chosen the same way every time: medians class by class, then the worst ones. CAMs run from dark (0) to yellow "
        f"(1), with a white line at 0.15; hatched pixels are left out of training (255).{told}"
    )
    return section("examples", "Examples", rows, lead)


def _example(example: Example, used: Sequence[int], classes: ClassTable) -> str:
    candidate = example.candidate
    what = "pseudo mask" if candidate.kind == "pseudo_masks" else "prediction"
    told = f"{what} {'IoU' if candidate.is_iou else 'confidence'} {candidate.score:.2f}"
    badge = f'<span class="badge">{told}</span>'
    if example.is_worst:
        badge = f'<span class="badge worst">among the worst · {told}</span>'
    panels = "".join(f"<div>{''.join(panel_figure(panel) for panel in example.columns[index])}</div>" for index in used)
    title = f"<code>{esc(candidate.image_id)}</code>{badge}{chips(classes, candidate.labels)}"
    return (
        f'<article class="example"><p>{title}</p><div class="panels" style="--n:{len(used)}">{panels}</div></article>'
    )


def panel_figure(panel: Panel) -> str:
    """A picture with its caption."""
    if panel.image is None:
        return f'<figure><div class="none">none</div><figcaption>{esc(panel.caption)}</figcaption></figure>'
    height, width = panel.image.shape[:2]
    source = data_uri(to_jpeg(panel.image, 84))
    picture = f'<img src="{source}" alt="{esc(panel.caption)}" width="{width}" height="{height}">'
    return f"<figure>{picture}<figcaption>{esc(panel.caption)}</figcaption></figure>"


def subcategories_section(numbers: RunNumbers, galleries: Sequence[Gallery]) -> str:
    """Cluster sizes of every class and round, and the images nearest to each centroid."""
    if not numbers.subcategories:
        told = '<p class="soft">This run has no sub-categories: it has parent classes only, or has not come so far.</p>'
        return section("subcategories", "Sub-categories", told)
    parts = [_sizes(numbers)]
    last = max((gallery.round_index for gallery in galleries), default=None)
    for gallery in sorted(galleries, key=lambda gallery: -gallery.round_index):
        opened = " open" if gallery.round_index == last else ""
        parts.append(
            f"<details{opened}><summary>Round {gallery.round_index}: images nearest to each centroid</summary>"
            f'<p class="note">Nearest of the {gallery.num_seen:,} rows searched, the nearest first.</p>'
            f"{_gallery(gallery, numbers.classes)}</details>"
        )
    left_out = sorted(set(numbers.subcategories) - {gallery.round_index for gallery in galleries})
    if left_out:
        rounds = ", ".join(str(index) for index in left_out)
        parts.append(
            f'<p class="note">No gallery for round {rounds}: the page would grow too large (report.max_tiles).</p>'
        )
    lead = "Clusters inside each parent class, found in one round and trained on in the next."
    return section("subcategories", "Sub-categories", "".join(parts), lead)


def _sizes(numbers: RunNumbers) -> str:
    """Sizes as bars, with balance and inertia, a row a class and round."""
    rows = []
    for class_index, name in enumerate(numbers.classes.names):
        for index, result in sorted(numbers.subcategories.items()):
            counts = result["counts"][class_index]
            bar = stacked_bar(counts, f"sizes of the sub-categories of {name} in round {index}: {counts}")
            cells = [
                f'<td class="n">{index}</td><td>{bar}</td>',
                f'<td class="n">{sum(counts):,}</td><td class="n">{min(counts):,} – {max(counts):,}</td>',
                f'<td class="n">{number(result["balance"][class_index], 2)}</td>',
                f'<td class="n">{float(result["inertia"][class_index]):,.4g}</td>',
            ]
            rows.append(f"<tr><th>{swatch(numbers.classes, class_index + 1)}{esc(name)}</th>{''.join(cells)}</tr>")
    heads = ("class", "round", "sizes", "images", "smallest – largest", "balance", "inertia")
    head = "".join(
        f"<th>{text}</th>" if index in (0, 2) else f'<th class="n">{text}</th>' for index, text in enumerate(heads)
    )
    whole = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return whole if len(rows) <= 24 else f"<details><summary>Sizes, {len(rows)} rows</summary>{whole}</details>"


def _gallery(gallery: Gallery, classes: ClassTable) -> str:
    parts = []
    for class_index, group in itertools.groupby(gallery.clusters, key=lambda cluster: cluster.class_index):
        shown = "".join(_cluster(cluster) for cluster in group)
        parts.append(f'<h3>{chips(classes, [class_index])}</h3><div class="gallery">{shown}</div>')
    return "".join(parts)


def _cluster(cluster: ClusterTiles) -> str:
    count = f"{cluster.num_images:,} image{'' if cluster.num_images == 1 else 's'}"
    title = f"<p><b>{cluster.cluster_id}</b> · {count}</p>"
    if not cluster.tiles:
        return f'<div class="cluster">{title}<p>none among the rows searched</p></div>'
    tiles = "".join(
        f'<img src="{uri}" alt="{esc(image_id)}" title="{esc(image_id)}, distance {distance:.3g}">'
        for image_id, distance, uri in cluster.tiles
    )
    return (
        f'<div class="cluster">{title}<div class="tiles" style="--n:{max(5, len(cluster.tiles))}">{tiles}</div></div>'
    )


def bad_images_section(numbers: RunNumbers) -> str:
    """Images that were left out, with stage and reason."""
    if not numbers.num_bad:
        return section("quarantine", "Quarantine", '<p class="soft">Every image and mask could be read.</p>')
    rows = [[bad.stage.replace("_", " "), bad.image_id, bad.reason, bad.uri] for bad in numbers.bad_images]
    left = numbers.num_bad - len(rows)
    more = f'<p class="note">… and {left:,} more; the markers of the stages name them all.</p>' if left else ""
    lead = f"{numbers.num_bad:,} image{'' if numbers.num_bad == 1 else 's'} could not be used and were left out."
    heads = ["stage", "image_id", "reason", "file"]
    return section("quarantine", "Quarantine", table(heads, rows, text_columns=4) + more, lead)


def reproduce_section(numbers: RunNumbers, command: str, flattened: Mapping[str, str]) -> str:
    """The command, the resolved settings and the versions."""
    parts = [f"<h3>Command</h3><pre>{esc(command)}</pre>"] if command else []
    parts.append(f"<h3>Versions</h3>{definitions(_versions(numbers))}")
    groups: dict[str, list[list[str]]] = {}
    for key, value in flattened.items():
        group = key.split(".", 1)[0] if "." in key else "run"
        groups.setdefault(group, []).append([key, value])
    tables = "".join(
        f"<div><b>{esc(g)}</b>{table(['key', 'value'], rows, text_columns=2, kind='config')}</div>"
        for g, rows in groups.items()
    )
    parts.append(
        f'<details><summary>Settings, {len(flattened)} values</summary><div class="columns">{tables}</div></details>'
    )
    return section(
        "reproduce",
        "Making it again",
        "".join(parts),
        "The same command goes on where a run stopped, and skips what is complete.",
    )


def _versions(numbers: RunNumbers) -> dict[str, Any]:
    """Versions of what made the page; the stages' own code versions beside it."""
    codes = sorted({record.code_version for record in numbers.stages if record.code_version})
    found: dict[str, Any] = {"code": ", ".join(codes) or "not known", "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
