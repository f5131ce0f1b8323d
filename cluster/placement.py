"""Room for the actors and workers of a stage: each must fit on one node, and what fits nowhere ends with the reason."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import ray
from pydantic import AfterValidator

logger = logging.getLogger("subcat")

WAIT_S = 60.0
"""How long nodes are waited for unless something else is said."""

_CHECK_S = 2.0
_UNITS = 10_000  # Ray counts resources in such parts of one
_MAX_KINDS = 6
_wait_s = WAIT_S


def _check_gpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a share of one GPU (such as 0.5) or a whole number of them; Ray gives out nothing between")
    return value


Gpus = Annotated[float, AfterValidator(_check_gpus)]
"""GPUs of one actor or worker: a share of one, or whole ones."""


class NodeSize(NamedTuple):
    """What a node has in all, in use or not."""

    cpus: float
    gpus: float


@dataclasses.dataclass(frozen=True)
class Ask:
    """num actors or workers (`noun`) of a stage with so many CPUs and GPUs each; remedy: what to do if it is too much.

    spare_cpu: one CPU more on any of the nodes, for the tasks of Ray Data.
    """

    stage: str
    noun: str
    num: int
    cpus: float
    gpus: float
    remedy: str
    spare_cpu: bool = False

    def num_that_fit(self, nodes: Sequence[NodeSize]) -> int:
        """How many of the `num` the nodes hold at once when nothing else is on them."""
        room = [self._room(node) for node in nodes]
        if not self.spare_cpu:
            return min(self.num, sum(room))
        lost = [
            here - self._room(node._replace(cpus=node.cpus - 1))
            for here, node in zip(room, nodes, strict=True)
            if node.cpus >= 1
        ]
        return min(self.num, sum(room) - min(lost)) if lost else 0

    def _room(self, node: NodeSize) -> int:
        counts = [self.num]
        if cpus := _units(self.cpus):
            counts.append(_units(node.cpus) // cpus)
        gpus = _units(self.gpus)
        if gpus > _UNITS:
            counts.append(_units(node.gpus) // gpus)
        elif gpus:  # no share reaches over two GPUs
            counts.append(int(node.gpus) * (_UNITS // gpus))
        return min(counts)

    def bundles(self) -> list[dict[str, float]]:
        """The same for a placement group of Ray."""
        each = {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value}
        return ([each] * self.num if each else []) + ([{"CPU": 1.0}] if self.spare_cpu else [])

    def shortage(self, nodes: Sequence[NodeSize]) -> str:
        """What is asked, and what each node has."""
        kinds = collections.Counter(nodes).most_common()
        named = [f"{count} of {_amount(*node)}" for node, count in kinds[:_MAX_KINDS]]
        named += [f"{len(kinds) - _MAX_KINDS} more kinds"] if len(kinds) > _MAX_KINDS else []
        one = self.num == 1
        who = f"1 {self.noun.removesuffix('s')} asks" if one else f"{self.num} {self.noun} ask"
        what = _amount(self.cpus, self.gpus) + ("" if one else " each")
        spare = ", and Ray Data's tasks 1 CPU" if self.spare_cpu else ""
        return (
            f"{self.stage}: {who} for {what}{spare}; each must fit on one node, and there is room for "
            f"{self.num_that_fit(nodes)} (nodes: {', '.join(named) or 'none'})"
        )


@contextlib.contextmanager
def waiting_for_nodes(seconds: float) -> Iterator[None]:
    """Within the block stages wait so long for nodes that hold what they ask; 0 where no node can come."""
    global _wait_s
    before, _wait_s = _wait_s, seconds
    try:
        yield
    finally:
        _wait_s = before


class RoomWatch:
    """Looks again and again whether a cluster could hold an ask, and gives up when it could not for too long.

    The time starts anew as long as an autoscaler says that machines are coming. nodes, coming, clock: for tests.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        nodes: Callable[[], list[NodeSize]] | None = None,
        coming: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._wait_s = ask, _wait_s
        self._nodes, self._coming, self._clock = nodes or node_sizes, coming or machines_are_coming, clock
        self._looked_s = self._told_s = float("-inf")
        self._short_since_s: float | None = None

    def has_room(self) -> bool:
        """Whether all fit, other work aside. ValueError once they did not for the time that nodes are waited for."""
        now_s = self._clock()
        nodes = self._nodes()
        self._looked_s = now_s
        if self._ask.num_that_fit(nodes) >= self._ask.num:
            self._short_since_s = None
            return True
        coming = self._wait_s > 0 and self._coming()
        if self._short_since_s is None or coming:
            self._short_since_s = now_s
        if now_s - self._short_since_s >= self._wait_s:
            raise ValueError(self._too_small(nodes))
        if now_s - self._told_s >= WAIT_S:
            self._told_s = now_s
            how_long = "machines are coming" if coming else f"waiting up to {self._wait_s:g} s for more nodes"
            logger.warning("%s; %s", self._ask.shortage(nodes), how_long)
        return False

    def check(self) -> None:
        """has_room, at most every two seconds: for loops that turn faster."""
        if self._clock() - self._looked_s >= _CHECK_S:
            self.has_room()

    def _too_small(self, nodes: Sequence[NodeSize]) -> str:
        text = f"{self._ask.shortage(nodes)}; {self._ask.remedy}"
        if self._wait_s == 0:
            return text
        return (
            f"{text}, or add nodes that hold one. No more came in cluster.wait_for_resources_s = {self._wait_s:g}: "
            "raise it where they come later"
        )


def wait_for_room(ask: Ask, *, until_free: bool = False) -> None:
    """Return when the cluster's nodes could hold what is asked; until_free: when they do, beside all other work.

    While it waits a placement group asks for the same, which is how an autoscaler hears of it, and is given up at the
    end. ValueError where the nodes are too small or too few, at the latest after cluster.wait_for_resources_s without
    a machine on its way; resources that others hold are waited for without end.
    """
    watch = RoomWatch(ask)
    if (watch.has_room() and not until_free) or not ask.bundles():
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    group: Any = placement_group(ask.bundles(), strategy="PACK")
    told_s = time.monotonic()
    try:
        while not group.wait(_CHECK_S if until_free else 0.5):
            if watch.has_room() and not until_free:
                return
            if until_free and time.monotonic() - told_s >= WAIT_S:
                told_s = time.monotonic()
                logger.warning("%s: waiting for %d %s that other work holds", ask.stage, ask.num, ask.noun)
    finally:
        remove_placement_group(group)


def node_sizes() -> list[NodeSize]:
    """The nodes that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeSize(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in resources]


def machines_are_coming() -> bool:
    """Whether Ray's autoscaler has asked for machines that are not there yet; version 2 alone tells."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception as error:  # not a public interface: without it waits are only shorter
        logger.debug("the autoscaler's state cannot be read: %s", error)
        return False
    return bool(status.pending_launches or status.pending_nodes)


def _units(value: float) -> int:
    return round(value * _UNITS)


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"
