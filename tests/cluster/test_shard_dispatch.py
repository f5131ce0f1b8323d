"""What the driver checks before k-means: the caches of all holders on a node together."""

from __future__ import annotations

import pytest

from cluster.shard_dispatch import Reservation, check_memory

GB = 10**9


def test_caches_on_one_node_are_added_up() -> None:
    check_memory([Reservation("a", 3, 3 * GB, 10 * GB), Reservation("b", 3, 3 * GB, 10 * GB)] * 2)
    with pytest.raises(
        ValueError,
        match=r"^k-means needs 9\.0 GB on one node \(b\) to cache 10 feature shards, and 10\.0 GB are free there; "
        r"use kmeans\.cache_bytes or kmeans\.stored_dtype = 'float16', or more nodes and actors$",
    ):
        check_memory([Reservation("a", 3, 3 * GB, 10 * GB), *[Reservation("b", 5, 4 * GB + GB // 2, 10 * GB)] * 2])
