"""Masks for the PASCAL VOC test server: every id of a list, checked against its image and packed as the server wants.

The server takes results/VOC2012/Segmentation/<competition>_test_cls/<id>.png in one .tgz, indexed by class id 0..20;
the answers to its lists are not public.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import json
import tarfile
from typing import Annotated, Any, Literal

import numpy as np
import typer

from cluster.progress import Progress
from cluster.runtime import ClusterSettings, check_shared_storage, start_ray
from cluster.storage import MissingFileError, Storage
from cluster.streams import StreamSettings
from jobs.config import ConfigError, load_experiment
from jobs.importers.voc import VOC_CLASSES, parse_list
from jobs.predict import PredictSettings, predict_images
from jobs.quarantine import told
from subcat_core.classes import BACKGROUND, ClassTable, to_class_ids
from subcat_core.images import ImageError, decode_mask, encode_mask, read_size

ARCHIVE = "results.tgz"

Competition = Literal["comp5", "comp6"]
"""comp5: trained on VOC's own images alone. comp6: on others too, ImageNet's for a start say."""

_NUM_SHOWN = 5


def submit(
    image_list: Annotated[str, typer.Argument(help="VOC list of image ids, such as ImageSets/Segmentation/test.txt.")],
    images: Annotated[str, typer.Option(help="Folder or s3:// prefix of the images, <id>.jpg.")],
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for results.tgz.")],
    model: Annotated[
        str | None, typer.Option(help="The folder `segmenter` of a finished run: its masks are made first.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="TOML config whose sections predict, stream and cluster count; default: as its run predicted."
        ),
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(help="Folder of <id>.png that hold VOC's class ids, in place of --model.")
    ] = None,
    comp5: Annotated[bool, typer.Option("--comp5", help="Trained on VOC's images alone; default: comp6.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of --config.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages, and whole traces.")] = False,
) -> None:
    """Masks of a VOC list, checked and packed for the evaluation server."""
    if (model is None) == (predictions is None):
        raise ConfigError("submission: give --model (to make masks) or --predictions (masks that are there)")
    if (config is not None and model is None) or (set_ and config is None):
        raise ConfigError("submission: --config goes with --model, and --set with --config; here it would do nothing")
    rows = image_rows(read_ids(image_list), Storage(images))
    folder = Storage(output)
    classes, masks = VOC_CLASSES, Storage(predictions or output)
    if model is not None:
        classes, masks = tuple(Storage(model).read_json("segmenter.json")["classes"]), folder.child("predictions/png")
    lut = voc_lut(classes)  # a class that is not VOC's is told before hours of work
    if model is not None:
        _predict(rows, Storage(model), folder.child("predictions"), config, set_ or [], verbose)
    typer.echo(write_submission(rows, masks, folder, lut=lut, competition="comp5" if comp5 else "comp6"))


def _predict(
    rows: list[dict[str, Any]], model: Storage, output: Storage, config: str | None, overrides: list[str], verbose: bool
) -> None:
    """Masks of the rows into output/png, by the settings of a config, or in this process as its run predicted."""
    settings, stream, cluster = _settings_of_run(model), StreamSettings(num_actors=0), ClusterSettings()
    if config is not None:
        experiment = load_experiment(config, overrides)
        settings, stream, cluster = experiment.predict, experiment.stream, experiment.cluster
    with start_ray(cluster, verbose=verbose) if stream.num_actors > 0 else contextlib.nullcontext():
        if stream.num_actors > 0:
            check_shared_storage(output, cluster.shared_folder)
        stats = predict_images(Progress(), segmenter=model, rows=rows, output=output, settings=settings, stream=stream)
    for line in told(output, stats):
        typer.echo(line)


def _settings_of_run(model: Storage) -> PredictSettings:
    """How the run predicted that the segmenter is of; the default where it was taken from its run."""
    run = Storage(model.root.rstrip("/").rpartition("/")[0])
    if not run.exists("config.json"):
        return PredictSettings()
    return PredictSettings.model_validate_json(json.dumps(run.read_json("config.json")["predict"]))


def read_ids(location: str) -> list[str]:
    """The image ids of a VOC list (ImageSets/Segmentation/test.txt), in its order.

    Raises ValueError where it is empty or has an id twice, StorageError where it cannot be read.
    """
    ids = [image_id for _, image_id in parse_list(Storage(location).read_bytes(""))]
    twice = sorted(image_id for image_id, count in collections.Counter(ids).items() if count > 1)
    if not ids or twice:
        found = f"holds {_shown(twice)} twice" if twice else "holds no id"
        raise ValueError(f"{location}: {found}; give a list with one image id a line, such as VOC's test.txt")
    return ids


def image_rows(ids: list[str], images: Storage, suffix: str = ".jpg") -> list[dict[str, Any]]:
    """Rows of image_id and uri, as `predict_images` takes them."""
    return [{"image_id": image_id, "uri": images.uri(f"{image_id}{suffix}")} for image_id in ids]


def voc_lut(classes: tuple[str, ...]) -> np.ndarray:
    """(256,) int16: class id of these classes -> that of VOC's table, -1 for values that a submission must not have.

    classes: names of the segmenter's classes, all of them VOC's; ValueError names one that is not.
    """
    voc = ClassTable(VOC_CLASSES)
    own_ids, voc_ids = to_class_ids(range(len(classes))), to_class_ids([voc.index_of(name) for name in classes])
    values = dict(zip(own_ids.tolist(), voc_ids.tolist(), strict=True))
    return ClassTable(VOC_CLASSES, {BACKGROUND: BACKGROUND} | values).mask_lut()


def voc_palette() -> bytes:
    """768 bytes: VOC's own colours, whose red, green and blue are the bits of the index, spread from the top."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8).tobytes()


def write_submission(
    rows: list[dict[str, Any]],
    masks: Storage,
    output: Storage,
    *,
    lut: np.ndarray,
    competition: Competition = "comp6",
) -> str:
    """Write output/results.tgz, the masks in the order of the rows, and return its URI.

    The same masks give the same bytes.

    rows: image_id and the uri of its image; masks: folder of <image_id>.png; lut: as `voc_lut`. Raises ValueError that
    names the ids without a mask or an image, of another size than their image, or with values outside VOC's table;
    nothing is written then.
    """
    have = set(masks.list_names())
    missing = [row["image_id"] for row in rows if f"{row['image_id']}.png" not in have]
    if missing:
        raise ValueError(
            f"{masks.root}: no mask for {len(missing)} of {len(rows)} ids ({_shown(missing)}); the server wants all: "
            "predict them, or give the list that these masks are of"
        )
    packed = io.BytesIO()
    wrong: list[str] = []
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for row in rows:
            try:
                data = _checked(row, masks, lut)
            except (ImageError, MissingFileError) as error:
                wrong.append(f"{row['image_id']}: {error}")
                continue
            name = f"results/VOC2012/Segmentation/{competition}_test_cls/{row['image_id']}.png"
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(rows)} masks cannot be submitted: {_shown(wrong, '; ')}")
    output.write_bytes(ARCHIVE, packed.getvalue())
    return output.uri(ARCHIVE)


def _checked(row: dict[str, Any], masks: Storage, lut: np.ndarray) -> bytes:
    """The mask's PNG with VOC's values and colours. Raises ImageError or MissingFileError."""
    mask = decode_mask(masks.read_bytes(f"{row['image_id']}.png"), lut)
    size = read_size(Storage(row["uri"]).read_bytes(""))
    if mask.shape != size:
        raise ImageError(f"the mask is {mask.shape[0]} x {mask.shape[1]} px, its image {size[0]} x {size[1]} px")
    return encode_mask(mask, voc_palette())


def _shown(values: list[str], separator: str = ", ") -> str:
    more = f"{separator}..." if len(values) > _NUM_SHOWN else ""
    return separator.join(values[:_NUM_SHOWN]) + more
