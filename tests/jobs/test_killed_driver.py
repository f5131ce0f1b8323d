"""A driver killed with SIGKILL while Ray runs: its processes end with it, and the same command goes on to the same end.

tests/jobs/test_pipeline.py kills runs in process, in every stage; here Ray's own processes must go too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from cluster.runtime import ROOT
from tests.jobs.conftest import scores_of, small_values, write_toml

EPOCHS = 6
NUM_SHARDS = 8
LONGEST_RUN_S = 600.0  # half a minute where nothing else runs
LONGEST_END_S = 60.0  # Ray's workers look for their raylet every few seconds


class Run:
    """`python -m jobs run CONFIG` as the leader of a session, which all that it starts belongs to."""

    def __init__(self, config: str, log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:  # an unread pipe would stop a run that says much
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", "run", config],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return as soon as something has happened; the run must not end before."""
        deadline_s = time.monotonic() + LONGEST_RUN_S
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def wait_until_gone(self) -> None:
        """Until no process of the session is left; fails with their names after a bounded time."""
        deadline_s = time.monotonic() + LONGEST_END_S
        while left := self.members():
            assert time.monotonic() < deadline_s, [member.info for member in left]
            time.sleep(0.1)

    def members(self) -> list[psutil.Process]:
        """Processes of the session that are alive; Ray gives workers process groups of their own, but no session."""
        found = []
        for process in psutil.process_iter(["pid", "name", "status", "cmdline"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to the driver and all of its process group, at once, and to the workers that compute.

        Those have groups of their own, and look for their raylet every few seconds only: a tiny run would be at its end
        before. Ray's other workers are left to end by themselves.
        """
        computing = [each for each in self.members() if each.info["name"].startswith(("ray::RayTrain", "ray::MapWor"))]
        os.killpg(self.process.pid, signal.SIGKILL)
        for each in computing:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    """Starts runs, whatever is left of which is killed in the end."""
    runs: list[Run] = []

    def begin(config: str) -> Run:
        runs.append(Run(config, tmp_path / f"run-{len(runs)}.log"))
        return runs[-1]

    yield begin
    for run in runs:
        for process in run.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        run.process.wait()


def test_a_driver_killed_under_ray_leaves_no_process_and_goes_on_to_the_same_scores(
    tiny_table: Path, tmp_path: Path, start: Callable[[str], Run]
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = _config(tiny_table, killed)
    classifier, cams = killed / "rounds/00/classifier", killed / "rounds/00/cams"

    run = start(config)
    run.wait_for((classifier / "checkpoints/epoch-0001.pt").exists)
    names = {process.info["name"] for process in run.members()}
    assert {"raylet", "gcs_server"} <= names, "nothing would be told by their absence"
    run.kill()
    run.wait_until_gone()
    assert not (classifier / "result.json").exists()
    assert not (classifier / "marker.json").exists()
    newest = max((classifier / "checkpoints").iterdir())
    kept_history = torch.load(newest, weights_only=True)["history"]
    assert 1 <= len(kept_history) < EPOCHS

    run = start(config)
    run.wait_for(lambda: any(cams.glob("part-*.json")))
    run.kill()
    run.wait_until_gone()
    assert not (cams / "marker.json").exists()
    kept_shards = {path: path.read_bytes() for path in cams.glob("part-*.json")}
    assert 1 <= len(kept_shards) < NUM_SHARDS

    for each in (config, _config(tiny_table, whole)):
        run = start(each)
        assert run.process.wait(LONGEST_RUN_S) == 0, run.log.read_text()[-3000:]
        run.wait_until_gone()
    assert scores_of(str(killed)) == scores_of(str(whole))
    # What was done before a kill was not done again: records hold their timings.
    history = json.loads((classifier / "result.json").read_text())["history"]
    assert len(history) == EPOCHS
    assert history[: len(kept_history)] == kept_history
    assert {path: path.read_bytes() for path in kept_shards} == kept_shards


def _config(table: Path, output: Path) -> str:
    """One actor, one training worker, two images a shard, and a Ray of its own whatever RAY_ADDRESS says."""
    values = small_values(
        table,
        str(output),
        stream={"num_actors": 1},
        cluster={"address": "local", "num_cpus": 3, "num_gpus": 0, "object_store_bytes": 100_000_000},
    )
    values["prepare"]["rows_per_shard"] = 16 // NUM_SHARDS
    compute = {"num_workers": 1, "num_decode_workers": 0}
    for name, epochs in (("classifier", EPOCHS), ("segmenter", 2)):
        values[name]["compute"] = compute
        values[name]["optimiser"] = {**values[name]["optimiser"], "epochs": epochs}
    return write_toml(output.with_suffix(".toml"), values)
