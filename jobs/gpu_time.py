"""GPUs that a stage holds, by its settings: what makes its GPU hours, in its marker and in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jobs.config import Experiment

_ON_GPU_ACTORS = ("make_cams", "make_train_cams", "extract_features", "predict", "predict_train", "predict_supervised")

_TRAININGS = {  # stage -> the section of its settings
    "train_classifier": "classifier",
    "train_affinity": "affinity",
    "train_segmenter": "segmenter",
    "train_supervised": "segmenter",
}


def held_gpus(experiment: Experiment, stage: str) -> float:
    """GPUs that the stage asks Ray for; in this process (no workers, no actors) 1 where torch sees one, else 0.

    0 for stages that work on CPUs. Actors past the number of shards are counted, though they are not started.
    """
    section = _TRAININGS.get(stage)
    stream = experiment.stream
    here = float(torch.cuda.is_available())
    if section is not None:
        compute = getattr(experiment, section).compute
        return compute.num_workers * compute.gpus_per_worker if compute.num_workers else here
    if stage == "cluster_features":  # without actors it computes on the CPU
        return stream.num_actors * stream.gpus_per_actor
    if stage in _ON_GPU_ACTORS or (stage == "make_pseudo_masks" and experiment.affinity is not None):
        return stream.num_actors * stream.gpus_per_actor if stream.num_actors else here
    return 0.0
