"""The affinity net between CAMs and pseudo masks, in process: labels, training, walk, scores; and its section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.artifacts import Artifact
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import make_affinity_labels, make_pseudo_masks, pipeline, prepare, train_affinity
from jobs.affinity_settings import IrnStageSettings, PsaStageSettings
from jobs.cam_tables import read_truth
from jobs.config import ConfigError, parse_experiment
from jobs.context import StageContext
from jobs.execution import needs_ray
from jobs.manifest import Manifest, open_manifest
from jobs.summary import _scores
from subcat_core import schemas
from subcat_core.classes import IGNORE
from subcat_core.images import decode_mask
from tests.jobs.conftest import Tiny, small_values

_COMPUTE = {"num_workers": 0, "num_decode_workers": 0}
_OPTIMISER = {"epochs": 6, "batch_size": 4, "learning_rate": 0.003, "momentum": 0.9, "precision": "fp32"}
PSA: dict[str, Any] = {
    "labels": {"crf": None},
    "net": {"backbone": {"name": "timm:mobilenetv2_050", "output_stride": 8, "weights": "none"}, "radius": 4},
    "augment": {"crop_px": 64},
    "optimiser": {**_OPTIMISER, "freeze_batch_norm": False},
    "compute": _COMPUTE,
}
IRN: dict[str, Any] = {
    "kind": "irn",
    "labels": {"crf": None},
    "net": {"backbone": {"name": "timm:mobilenetv2_050", "output_stride": 16, "weights": "none"}, "radius": 5},
    "augment": {"crop_px": 64},
    "optimiser": _OPTIMISER,
    "compute": _COMPUTE,
}


def _cams(context: StageContext, manifest: Manifest) -> Artifact:
    """CAMs that hold the middle of every object, as those of a classifier do; the first image has no tags."""
    artifact = Artifact(context.storage, "rounds/01/cams", {"stage": "make_cams"})
    artifact.begin()
    for name in manifest.shard_names("train"):
        rows = []
        for row in manifest.folder.read_table(f"{name}.parquet").to_pylist():
            truth = read_truth(row, manifest.classes)[2::4, 2::4]
            present = [] if row["image_id"].endswith("000") else row["labels"]
            maps = np.zeros((len(present), *truth.shape), np.float16)
            for index, label in enumerate(present):
                y, x = np.nonzero(truth == label + 1)
                grid_y, grid_x = np.mgrid[: truth.shape[0], : truth.shape[1]]
                maps[index] = np.exp(-((grid_y - y.mean()) ** 2 + (grid_x - x.mean()) ** 2) / 4)
            shape = {"cam_height": truth.shape[0], "cam_width": truth.shape[1]}
            rows.append({"image_id": row["image_id"], "class_indices": present, **shape, "cam": maps.ravel()})
        artifact.folder.write_table(f"{name}.parquet", pa.Table.from_pylist(rows, schemas.CAMS))
    artifact.commit({})
    return artifact


def _run(values: dict[str, Any]) -> tuple[StageContext, Manifest]:
    """From the manifest to pseudo masks, with CAMs made by hand."""
    experiment = parse_experiment(values)
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        context = StageContext(experiment, storage, Progress(), tracker)
        prepare.run(context)
        manifest = open_manifest(storage)
        cams = _cams(context, manifest)
        labels = make_affinity_labels.run(context, manifest, cams)
        net = train_affinity.run(context, manifest, labels)
        make_pseudo_masks.run(context, manifest, cams, context.experiment.pseudo_masks.mask, net)
    return context, manifest


@pytest.mark.parametrize("section", [PSA, IRN], ids=["psa", "irn"])
def test_from_cams_to_walked_masks(
    section: dict[str, Any], tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    crf = {"iterations": 1}
    values = tiny(affinity=section, pseudo_masks={"mask": {"crf": crf}})
    context, manifest = _run(values)
    storage = context.storage
    rows = manifest.rows("train", ["image_id", "mask_uri"]).to_pylist()
    tagged = [row for row in rows if not row["image_id"].endswith("000")]
    assert len(tagged) == len(rows) - 1 == 11

    # Labels: 11 maps of the net's cells or of pixels, and what they are sure of is mostly right.
    assert len(storage.list_names("affinity_labels/png")) == 11
    stats = storage.read_json("affinity_labels/marker.json")["stats"]
    assert stats["num_images"] == 11
    assert 0.03 < stats["foreground_frac"] < 0.3
    assert 0.4 < stats["background_frac"] < 0.97
    for row in tagged:
        labels = decode_mask(
            storage.read_bytes(f"affinity_labels/png/{row['image_id']}.png"), manifest.classes.mask_lut()
        )
        truth = read_truth(row, manifest.classes)
        assert labels.shape == ((6, 6) if section is PSA else (48, 48))
        truth = truth[4::8, 4::8] if section is PSA else truth
        assert (labels == truth)[labels != IGNORE].mean() > 0.85

    # The net learns, and is loaded as it was trained.
    history = storage.read_json("affinity/result.json")["history"]
    assert len(history) == 6
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"bg_loss", "fg_loss", "neg_loss"} <= history[0].keys()
    net = train_affinity.load_affinity(storage.child("affinity"), context.experiment.affinity)  # type: ignore[arg-type]
    with storage.child("affinity").fetch("model.pt") as path:
        state = torch.load(path, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not net.training

    # Masks, and the score of each step.
    assert len([name for name in storage.list_names("pseudo_masks/png") if name.endswith(".png")]) == 12
    scores = storage.read_json("pseudo_masks/scores.json")
    train = scores["splits"]["train"]
    assert train["num_images"] == train["before_walk"]["num_images"] == train["before_crf"]["num_images"] == 12
    assert len({train["miou"], train["before_walk"]["miou"], train["before_crf"]["miou"]}) > 1
    assert scores["protocol"]["random_walk"]["kind"] == section.get("kind", "psa")
    step = next(step for step in pipeline.plan(context.experiment) if step.stage == "make_pseudo_masks")
    assert [row[0] for row in _scores(storage, step)] == ["CAM, before the walk", "+ random walk", "pseudo masks"]

    capfd.readouterr()
    _run(values)
    told = "".join(capfd.readouterr())
    assert told.count("complete, skipped") == 4
    # Another walk needs no other net: only the masks are refused.
    other = {**section, "walk": {"log_steps": 2}}
    with pytest.raises(ValueError, match=r"pseudo_masks holds a finished output.*affinity\.walk\.log_steps: 8 -> 2"):
        _run({**values, "affinity": other})


@pytest.mark.parametrize("section", [PSA, IRN], ids=["psa", "irn"])
def test_two_ray_workers_and_two_actors_do_what_one_process_does(
    section: dict[str, Any], tiny: Tiny, tmp_path: Path, ray_cluster: None
) -> None:
    """The counts of pairs are those of both ranks, or the losses would differ: ranks see very different images."""
    steady = {"freeze_batch_norm": True, "learning_rate": 0.0005}
    section = {**section, "optimiser": {**section["optimiser"], **steady}}
    alone, _ = _run(tiny(affinity=section))
    compute = {"num_workers": 2, "input": "ray", "cpus_per_worker": 1.0}
    values = tiny(str(tmp_path / "ray"), affinity={**section, "compute": compute}, stream={"num_actors": 2})
    together, _ = _run(values)
    losses, expected = (
        [record["loss"] for record in context.storage.read_json("affinity/result.json")["history"]]
        for context in (together, alone)
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    found, before = (context.storage.read_json("pseudo_masks/scores.json")["splits"] for context in (together, alone))
    for step in ("before_walk", "before_crf"):
        assert found["train"][step]["miou"] == pytest.approx(before["train"][step]["miou"], abs=0.01)


def test_plan_has_the_stages_only_with_the_section(tiny: Tiny) -> None:
    without = [step.stage for step in pipeline.plan(parse_experiment(tiny()))]
    assert not {"make_affinity_labels", "train_affinity"} & set(without)
    stages = [step.stage for step in pipeline.plan(parse_experiment(tiny(affinity=PSA)))]
    place = stages.index("make_affinity_labels")
    assert stages[place - 1 : place + 3] == [
        "make_train_cams",
        "make_affinity_labels",
        "train_affinity",
        "make_pseudo_masks",
    ]
    assert set(stages) <= set(pipeline.STAGES)
    experiment = parse_experiment(tiny())
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        context = StageContext(experiment, storage, Progress(), tracker)
        with pytest.raises(ValueError, match="--stage train_affinity: this config has no such stage; it has prepare"):
            pipeline.run(context, "train_affinity")


def test_kind_decides_the_defaults(tiny: Tiny) -> None:
    psa, irn = (parse_experiment(tiny(affinity=section)).affinity for section in ({}, {"kind": "irn"}))
    assert isinstance(psa, PsaStageSettings)
    assert (psa.labels.alpha_low, psa.labels.alpha_high, psa.walk.alpha) == (4.0, 32.0, 16.0)
    assert (psa.net.radius, psa.walk.beta, psa.walk.log_steps, psa.net.pad_border) == (5, 8.0, 8, True)
    assert (psa.optimiser.epochs, psa.optimiser.batch_size, psa.augment.crop_px) == (8, 8, 448)
    assert (psa.optimiser.learning_rate, psa.optimiser.momentum, psa.optimiser.weight_decay) == (0.01, 5e-4, 5e-4)
    assert psa.net.backbone.output_stride == 8
    assert isinstance(irn, IrnStageSettings)
    assert (irn.labels.foreground_score, irn.labels.background_score, irn.walk.background_score) == (0.30, 0.05, 0.25)
    assert (irn.net.radius, irn.walk.radius, irn.walk.beta, irn.walk.log_steps) == (10, 5, 10.0, 8)
    assert (irn.optimiser.epochs, irn.optimiser.batch_size, irn.augment.crop_px) == (3, 32, 512)
    assert (irn.optimiser.learning_rate, irn.optimiser.momentum, irn.optimiser.weight_decay) == (0.1, 1e-4, 1e-4)
    # What a config writes back is read again as the same.
    experiment = parse_experiment(tiny(affinity=IRN))
    assert parse_experiment(experiment.model_dump(mode="json")) == experiment
    assert experiment.for_round(1) is experiment


def test_errors_name_the_dotted_key(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"affinity\.walk\.betta: unknown key; nearest: beta"):
        parse_experiment(tiny(affinity={"walk": {"betta": 3}}))
    with pytest.raises(ConfigError, match=r"affinity\.labels\.alpha_low: unknown key"):
        parse_experiment(tiny(affinity={"kind": "irn", "labels": {"alpha_low": 3.0}}))
    with pytest.raises(
        ConfigError, match=r"affinity: augment\.crop_px = 100 is no whole number of cells of 8 px; take 96"
    ):
        parse_experiment(tiny(affinity={"augment": {"crop_px": 100}}))
    with pytest.raises(ConfigError, match=r"affinity.*psa.*irn"):
        parse_experiment(tiny(affinity={"kind": "sem"}))
    with pytest.raises(ConfigError, match=r"affinity\.optimiser\.batch_size = 8: does not divide among 3 workers"):
        parse_experiment(tiny(affinity={"compute": {"num_workers": 3}}))


def test_needs_ray_where_its_training_does(tiny: Tiny) -> None:
    assert not needs_ray(parse_experiment(tiny(affinity=PSA)))
    assert needs_ray(parse_experiment(tiny(affinity={**PSA, "compute": {"num_workers": 1}})))


@pytest.mark.parametrize("section", [PSA, IRN], ids=["psa", "irn"])
def test_an_empty_sample_has_the_shape_of_a_real_one_and_no_pairs(section: dict[str, Any], tiny: Tiny) -> None:
    settings = parse_experiment(tiny(affinity=section)).affinity
    assert settings is not None
    trainee = train_affinity.trainee_of(settings, 2)
    image = np.zeros((50, 70, 3), np.uint8)
    labels = np.zeros((7, 9) if section is PSA else (50, 70), np.uint8)
    crop, cut = trainee.crop(image, labels, np.random.default_rng(0), (1, 2, 3))
    empty = trainee.empty_sample()
    assert {"image": (crop.shape, crop.dtype), "labels": (cut.shape, cut.dtype)} == {
        key: (value.shape, value.dtype) for key, value in empty.items()
    }
    batch = {key: torch.from_numpy(value[None]) for key, value in empty.items()}
    loss, _ = trainee.loss(trainee.build_model(), batch)
    assert loss.item() == 0
    loss.backward()


def test_a_whole_run_with_the_net_goes_through_the_pipeline(tiny_table: Path, tmp_path: Path) -> None:
    experiment = parse_experiment(small_values(tiny_table, str(tmp_path / "out"), affinity=PSA))
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        pipeline.run(StageContext(experiment, storage, Progress(), tracker), "make_pseudo_masks")
    scores = storage.read_json("pseudo_masks/scores.json")
    assert {"before_walk", "before_crf"} <= set(scores["splits"]["train"])
    assert scores["protocol"]["random_walk"]["kind"] == "psa"
    assert "background" not in storage.read_json("choice/choice.json")  # the walk has one of its own
