"""Memory of all processes of a run on the driver's machine, sampled while a stage works."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

_INTERVAL_S = 2.0


class MemorySampler:
    """`with MemorySampler() as sampler:` ... then sampler.peak_bytes.

    Counts this process and its descendants: a local Ray cluster with its object store, actors and decode processes.
    Workers on other machines, and those of a cluster that was joined, are not among them.
    """

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, run_bytes())

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, run_bytes())


def run_bytes() -> int:
    """Resident bytes of this process and its descendants, now.

    Private pages of each, and the shared pages of the one that maps most: the object store is mapped by every worker
    and would count once a worker in a plain sum.
    """
    private, shared = 0, 0
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            memory = process.memory_info()
        except psutil.Error:  # it ended between the two calls
            continue
        mapped = getattr(memory, "shared", 0)  # Linux alone tells
        private += memory.rss - mapped
        shared = max(shared, mapped)
    return private + shared
