"""Memory of a run: a child's pages count, a shared block counts once, and the peak outlives the block."""

import multiprocessing
import time
from multiprocessing import shared_memory

import numpy as np

from cluster.memory import MemorySampler, run_bytes

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
