"""Room for actors and workers: node tables by hand, waits by a clock of the test, and the same on a real cluster."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import placement_group_table

from cluster.placement import Ask, NodeSize, RoomWatch, machines_are_coming, wait_for_room, waiting_for_nodes
from cluster.streams import StreamSettings
from cluster.trainee import TrainComputeSettings

HEAD, CPU_NODE, GPU_NODE = NodeSize(0, 0), NodeSize(8, 0), NodeSize(7, 1)
REMEDY = "lower stream.num_actors"


def ask(num: int, cpus: float, gpus: float = 0.0, spare_cpu: bool = False) -> Ask:
    return Ask("make_cams", "actors", num, cpus, gpus, REMEDY, spare_cpu)


@pytest.mark.parametrize(
    ("asked", "nodes", "num_that_fit"),
    [
        (ask(1, 4), [NodeSize(2, 0)] * 4, 0),  # 8 CPUs in all, and no node has 4
        (ask(3, 2), [NodeSize(4, 0), NodeSize(2, 0)], 3),
        (ask(3, 2, spare_cpu=True), [NodeSize(4, 0), NodeSize(2, 0)], 2),
        (ask(3, 2, spare_cpu=True), [NodeSize(5, 0), NodeSize(2, 0)], 3),  # the odd CPU is spare
        (ask(2, 0.4, spare_cpu=True), [NodeSize(0.9, 0)] * 2, 0),  # no node has a whole CPU for the tasks
        (ask(2, 1, 1), [HEAD, CPU_NODE, GPU_NODE, GPU_NODE], 2),
        (ask(3, 1, 1), [HEAD, CPU_NODE, GPU_NODE, GPU_NODE], 2),
        (ask(4, 1, 0.5, spare_cpu=True), [HEAD, GPU_NODE, GPU_NODE], 4),
        (ask(9, 1, 0.6), [NodeSize(16, 2)], 2),  # no share reaches over two GPUs
        (ask(9, 1, 2), [NodeSize(16, 3), NodeSize(16, 1)], 1),
        (ask(20, 0.1), [NodeSize(1, 0)], 10),  # 1.0 // 0.1 is 9
        (ask(5, 0), [HEAD], 5),
        (ask(1, 1), [], 0),
    ],
)
def test_each_must_fit_on_one_node(asked: Ask, nodes: list[NodeSize], num_that_fit: int) -> None:
    assert asked.num_that_fit(nodes) == num_that_fit


def test_a_spare_cpu_is_found_where_every_way_of_placing_finds_it(rng: np.random.Generator) -> None:
    for _ in range(200):
        nodes = [NodeSize(float(cpus), 0.0) for cpus in rng.integers(0, 6, size=3)]
        cpus, num = int(rng.integers(1, 4)), int(rng.integers(1, 7))
        ways = itertools.product(*(range(int(node.cpus) // cpus + 1) for node in nodes))
        best = max(
            (
                sum(way)
                for way in ways
                if any(node.cpus - count * cpus >= 1 for node, count in zip(nodes, way, strict=True))
            ),
            default=0,
        )
        assert ask(num, cpus, spare_cpu=True).num_that_fit(nodes) == min(num, best)


def test_the_shortage_says_what_is_asked_and_what_the_nodes_have() -> None:
    assert ask(3, 1, 1).shortage([HEAD, GPU_NODE, GPU_NODE]) == (
        "make_cams: 3 actors ask for 1 CPU and 1 GPU each; each must fit on one node, and there is room for 2 "
        "(nodes: 2 of 7 CPUs and 1 GPU, 1 of 0 CPUs and 0 GPUs)"
    )
    assert (
        ask(1, 1.5)
        .shortage([])
        .endswith(
            "1 actor asks for 1.5 CPUs and 0 GPUs; each must fit on one node, and there is room for 0 (nodes: none)"
        )
    )


class Cluster:
    """Nodes and a clock that the test moves."""

    def __init__(self) -> None:
        self.nodes, self.coming, self.now_s = [HEAD], False, 100.0

    def watch(self, asked: Ask) -> RoomWatch:
        return RoomWatch(asked, nodes=lambda: self.nodes, coming=lambda: self.coming, clock=lambda: self.now_s)


def test_nodes_are_waited_for_and_those_on_their_way_longer(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    with waiting_for_nodes(60):
        watch = cluster.watch(ask(1, 1))
    for cluster.now_s, cluster.coming in ((100, False), (150, True), (209, True), (268, False)):
        assert not watch.has_room()
    cluster.nodes, cluster.now_s = [HEAD, CPU_NODE], 1000
    assert watch.has_room()
    cluster.nodes, cluster.now_s = [HEAD], 2000  # the node is lost: the time starts anew
    assert not watch.has_room()
    cluster.now_s = 2060
    with pytest.raises(
        ValueError,
        match=r"room for 0 \(nodes: 1 of 0 CPUs and 0 GPUs\); lower stream.num_actors, or add nodes that hold one. No "
        r"more came in cluster.wait_for_resources_s = 60: raise it where they come later$",
    ):
        watch.has_room()
    told = [record.getMessage().rpartition("; ")[2] for record in caplog.records]
    assert told == ["waiting up to 60 s for more nodes", "machines are coming", "waiting up to 60 s for more nodes"]


def test_a_loop_may_check_as_often_as_it_likes() -> None:
    cluster = Cluster()
    with waiting_for_nodes(0):
        watch = cluster.watch(ask(1, 1))
    cluster.nodes = [CPU_NODE]
    watch.check()
    cluster.nodes, cluster.now_s = [], 101.9
    watch.check()
    cluster.now_s = 102
    with pytest.raises(ValueError, match=r"\(nodes: none\); lower stream.num_actors$"):
        watch.check()


@pytest.mark.usefixtures("ray_cluster")
def test_what_never_fits_ends_after_the_wait() -> None:
    started_s = time.monotonic()
    with (
        waiting_for_nodes(1.0),
        pytest.raises(ValueError, match=r"1 actor asks for 9 CPUs .* room for 0 \(nodes: 1 of 8 CPUs .*_s = 1: raise"),
    ):
        wait_for_room(ask(1, 9))
    assert 1.0 <= time.monotonic() - started_s < 10.0
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


@pytest.mark.usefixtures("ray_cluster")
def test_what_others_hold_is_waited_for() -> None:
    holder: Any = ray.remote(Holder).options(num_cpus=8).remote()
    ray.get(holder.environment.remote())
    wait_for_room(ask(4, 2))  # it could fit: Ray itself waits for the rest
    thread = threading.Thread(target=lambda: wait_for_room(ask(4, 2), until_free=True), daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    ray.kill(holder)
    thread.join(20.0)
    assert not thread.is_alive()


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_without_gpus_sees_none_and_no_autoscaler_is_asked() -> None:
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}}
    holder: Any = ray.remote(Holder).options(**options).remote()
    assert ray.get(holder.environment.remote())["CUDA_VISIBLE_DEVICES"] == ""
    ray.kill(holder)
    assert get_cluster_status(ray.get_runtime_context().gcs_address).pending_nodes == []
    assert not machines_are_coming()


class Holder:
    """An actor that holds what it has booked."""

    def environment(self) -> dict[str, str]:
        return dict(os.environ)


def test_gpus_are_shares_of_one_or_whole() -> None:
    for gpus in (0, 0.25, 1, 2.0):
        assert StreamSettings(gpus_per_actor=gpus).gpus_per_actor == gpus
    with pytest.raises(ValueError, match=r"a share of one GPU \(such as 0\.5\) or a whole number of them"):
        StreamSettings(gpus_per_actor=1.5)
    with pytest.raises(ValueError, match=r"a share of one GPU"):
        TrainComputeSettings(num_workers=1, gpus_per_worker=2.5)


def test_ranges_of_workers() -> None:
    elastic = TrainComputeSettings(num_workers=4, min_workers=2)
    assert elastic.batch_problem(6) is None
    assert elastic.batch_problem(3) == "gives 4 workers less than an image each; take 4 or more"
    assert TrainComputeSettings(num_workers=4).batch_problem(6) == "does not divide among 4 workers; take 4 or 8"
    assert TrainComputeSettings().batch_problem(7) is None
    with pytest.raises(
        ValueError, match="min_workers = 2 is more than num_workers = 1; lower it, or raise num_workers"
    ):
        TrainComputeSettings(num_workers=1, min_workers=2)
