"""GPU hours: the GPUs of every stage by hand."""

import pytest
import torch

from jobs.config import parse_experiment
from jobs.gpu_time import held_gpus
from tests.jobs.conftest import Tiny


def test_gpus_that_ray_is_asked_for(tiny: Tiny) -> None:
    values = tiny(stream={"num_actors": 4, "gpus_per_actor": 0.5}, affinity={})
    values["classifier"]["compute"] = {"num_workers": 2, "gpus_per_worker": 1.0}
    values["segmenter"]["compute"] = {"num_workers": 4, "gpus_per_worker": 0.25}
    experiment = parse_experiment(values)
    wanted = {"train_classifier": 2, "train_segmenter": 1, "train_supervised": 1}
    wanted |= {"make_cams": 2, "extract_features": 2, "cluster_features": 2, "predict": 2, "make_pseudo_masks": 2}
    wanted |= {"prepare": 0, "choose_round": 0, "evaluate": 0, "make_affinity_labels": 0}
    assert {stage: held_gpus(experiment, stage) for stage in wanted} == wanted
    without = parse_experiment({**values, "affinity": None})
    assert held_gpus(without, "make_pseudo_masks") == 0


@pytest.mark.parametrize("is_there", [True, False])
def test_in_process_a_gpu_is_held_where_there_is_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    experiment = parse_experiment(tiny())
    assert held_gpus(experiment, "train_classifier") == is_there
    assert held_gpus(experiment, "make_cams") == is_there
    assert held_gpus(experiment, "cluster_features") == 0
    assert held_gpus(experiment, "evaluate") == 0
