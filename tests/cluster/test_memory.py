"""Memory of a run: a child's pages count, a shared block counts once, and the peak outlives the block."""

import multiprocessing
import time
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np

from cluster.memory import MemorySampler, _cgroup_rooms, free_bytes, run_bytes

MIB = 2**20


def _hold(name: str, num_private: int, ready: multiprocessing.Event, done: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    block = shared_memory.SharedMemory(name)
    mapped = np.ndarray(block.size, np.uint8, block.buf)
    mapped.sum()
    private = np.ones(num_private, np.uint8)
    ready.set()
    done.wait(60)
    del mapped, private
    block.close()


def test_children_count_and_shared_pages_count_once() -> None:
    context = multiprocessing.get_context("spawn")
    block = shared_memory.SharedMemory(create=True, size=200 * MIB)
    np.ndarray(block.size, np.uint8, block.buf)[:] = 1
    done = context.Event()
    before = run_bytes()
    children = []
    with MemorySampler(interval_s=0.05) as sampler:
        for _ in range(2):
            ready = context.Event()
            child = context.Process(target=_hold, args=(block.name, 100 * MIB, ready, done))
            child.start()
            children.append(child)
            assert ready.wait(60)
        with_children = run_bytes()
        time.sleep(0.2)
        done.set()
        for child in children:
            child.join(60)
    block.unlink()
    # Two children of 100 MiB and an interpreter each; the 200 MiB that all three map would make it 600 MiB more.
    assert 200 * MIB < with_children - before < 500 * MIB
    assert sampler.peak_bytes >= with_children - 50 * MIB
    assert run_bytes() < with_children - 150 * MIB


def write_cgroup(folder: Path, version: int, limit: str, usage: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    line = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 7\n{line} {inactive}\n")


def test_limits_of_cgroups_bound_what_is_free(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert list(_cgroup_rooms(tmp_path, own)) == []
    own.write_text("0::/pod/main\n")
    write_cgroup(tmp_path / "pod" / "main", 2, "max", 40, 0)
    write_cgroup(tmp_path / "pod", 2, "100", 60, 15)
    assert list(_cgroup_rooms(tmp_path, own)) == [55]
    own.write_text("5:cpu:/x\n4:hugetlb,memory:/host/path\n0::/\n")  # version 1, and the path is the host's
    write_cgroup(tmp_path / "memory", 1, "1000", 300, 50)
    assert list(_cgroup_rooms(tmp_path, own)) == [750]
    assert 0 < free_bytes() < 2**50
