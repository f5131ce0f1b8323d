"""Memory: what all processes of a run on the driver's machine take, sampled while a stage works; and what is free."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

_INTERVAL_S = 2.0
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_FILES = {  # version: limit, usage, the line of memory.stat on what is dropped at need
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


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


def free_bytes() -> int:
    """What this process may still take: of the machine's memory, and of the limits of the cgroups it is in."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms(_CGROUPS, _OWN_CGROUPS)])


def _cgroup_rooms(root: Path, own: Path) -> Iterator[int]:
    """Bytes left in each cgroup of this process that has a limit. root: where cgroups are mounted; own: "id:kinds:path"
    lines. In a container the path may be that of the host, and then only its mount's root is there.
    """
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        mount = root / "memory" if kinds else root
        folder = mount / path.lstrip("/")
        for cgroup in (folder, *folder.parents):
            if cgroup.is_relative_to(mount):
                yield from _cgroup_room(cgroup, *_CGROUP_FILES[1 if kinds else 2])


def _cgroup_room(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        limit_bytes = (folder / limit).read_text().strip()
        usage_bytes = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup here
        return
    if limit_bytes != "max":
        yield max(0, int(limit_bytes) - usage_bytes + int(stat.get(reclaimable, 0)))
