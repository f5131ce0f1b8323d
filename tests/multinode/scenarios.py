"""A job over several nodes, undisturbed and disturbed: it ends with the masks of one node, whatever was lost.

`make cluster-test`; not collected by `make test`, for its minutes. Each disturbed run begins from the finished stages
of the undisturbed one, so that only the stages it is about are done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from tests.multinode.conftest import LONGEST_RUN_S, Lab
from tests.multinode.nodes import Job, Node

AFTER_MASKS = ("segmenter", "predictions", "evaluation")
FROM_MASKS = ("pseudo_masks", *AFTER_MASKS)
AFTER_MANIFEST = ("rounds", "choice", "cams", *FROM_MASKS)


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> str:
    """Name of a run of the whole pipeline over three nodes."""
    lab.cluster.want_workers(2)
    job = lab.submit("undisturbed")
    assert _finish(job) == 0, job.told()[-4000:]
    return "undisturbed"


def test_three_nodes_make_the_masks_of_one(lab: Lab, single_node: str, undisturbed: str) -> None:
    _check_masks(lab, undisturbed, single_node)
    _check_tracking(lab, undisturbed)


def test_a_node_lost_while_masks_are_made(lab: Lab, undisturbed: str) -> None:
    def disturb(output: Path) -> None:
        lost = lab.cluster.find("MapWorker")
        _lose(lab, lost)
        assert not (output / "pseudo_masks/marker.json").exists(), "too late to tell anything"

    _run_disturbed(lab, undisturbed, "masks-node", FROM_MASKS, _first_mask, disturb)


def test_a_node_lost_in_training_is_replaced(lab: Lab, undisturbed: str) -> None:
    def disturb(output: Path) -> None:
        lost = lab.cluster.find("RayTrainWorker")
        _lose(lab, lost)
        assert not (output / "segmenter/result.json").exists(), "too late to tell anything"
        lab.cluster.want_workers(2)

    _run_disturbed(lab, undisturbed, "training-node", AFTER_MASKS, _first_checkpoint, disturb)


def test_a_killed_driver_is_submitted_again(lab: Lab, undisturbed: str) -> None:
    def disturb(output: Path) -> None:
        drivers = [process for process in lab.cluster.head.runs("-m jobs run") if "python" in process.name()]
        assert drivers
        for process in drivers:
            process.kill()
        assert not (output / "segmenter/result.json").exists(), "too late to tell anything"

    told = _run_disturbed(lab, undisturbed, "driver", AFTER_MASKS, _first_checkpoint, disturb, by_subcat=True)
    assert "submission 2 of at most 4" in told
    assert "its driver was lost" in told


def test_storage_away_for_20_seconds(lab: Lab, undisturbed: str) -> None:
    def disturb(output: Path) -> None:
        lab.s3.stop()
        time.sleep(20)
        lab.s3.start()
        assert not (output / "pseudo_masks/marker.json").exists(), "too late to tell anything"

    _run_disturbed(lab, undisturbed, "storage", FROM_MASKS, _first_mask, disturb)


def test_mlflow_away_for_60_seconds(lab: Lab, undisturbed: str) -> None:
    def disturb(output: Path) -> None:
        lab.mlflow.stop()
        time.sleep(60)
        lab.mlflow.start()
        assert not (output / "evaluation/marker.json").exists(), "the run ended first"

    _run_disturbed(lab, undisturbed, "mlflow", AFTER_MANIFEST, _first_classifier, disturb)


def _first_classifier(output: Path) -> bool:
    return any(output.glob("rounds/00/classifier/checkpoints/epoch-*.pt"))


def _first_mask(output: Path) -> bool:
    return any(output.glob("pseudo_masks/part-*.json"))


def _first_checkpoint(output: Path) -> bool:
    return any(output.glob("segmenter/checkpoints/epoch-*.pt"))


def _run_disturbed(
    lab: Lab,
    undisturbed: str,
    name: str,
    again: tuple[str, ...],
    begun: Callable[[Path], bool],
    disturb: Callable[[Path], None],
    *,
    by_subcat: bool = False,
) -> str:
    """Do these stages again, disturb them as soon as they have begun; the end is that of the run nobody disturbed."""
    lab.cluster.want_workers(2)
    lab.copy_before(name, undisturbed, again)
    job = lab.submit(name, by_subcat=by_subcat)
    try:
        job.wait_for(lambda: begun(lab.output(name)), LONGEST_RUN_S)
        disturb(lab.output(name))
    except BaseException:
        job.close()
        raise
    assert _finish(job) == 0, job.told()[-4000:]
    _check_masks(lab, name, undisturbed)
    scores = [(lab.output(run) / "evaluation/scores.json").read_text() for run in (name, undisturbed)]
    assert scores[0] == scores[1]
    _check_tracking(lab, name)
    return job.told()


def _finish(job: Job) -> int:
    try:
        code, seconds = job.finish(LONGEST_RUN_S)
    finally:
        job.close()
    print(f"ended with {code} after {seconds:.0f} s")
    return code


def _lose(lab: Lab, node: Node | None) -> None:
    assert node is not None, "no worker machine runs it"
    lab.cluster.lose(node)
    print(f"lost node {node.number} at {node.address}")


def _check_masks(lab: Lab, name: str, other: str) -> None:
    """The same files, byte for byte."""
    ours, theirs = lab.masks(name), lab.masks(other)
    assert sorted(ours) == sorted(theirs)
    assert [file for file in ours if ours[file] != theirs[file]] == []


def _check_tracking(lab: Lab, name: str) -> None:
    """One parent run, finished, and no metric with two values at a step."""
    client = mlflow.MlflowClient(lab.mlflow.url)
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    runs = client.search_runs([experiment.experiment_id], f"tags.output LIKE '%/{name}'")
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert len(runs) > 3
    for run in runs:
        for metric in run.data.metrics:
            if metric.endswith("loss"):
                steps = [each.step for each in client.get_metric_history(run.info.run_id, metric)]
                assert len(set(steps)) == len(steps), (run.info.run_name, metric)
