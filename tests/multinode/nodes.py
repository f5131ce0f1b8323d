"""Ray nodes, each in a namespace of its own with a /tmp/ray of its own; a head, workers, and machines that are lost."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import free_port
from tests.multinode.network import Network

BIN = Path(sys.executable).parent
CPUS_PER_WORKER = 3  # logical: one actor of two, and one for Ray Data's tasks
_LONGEST_START_S = 400.0
_MOST_STARTS = 3  # Ray gives its raylet half a minute, too little on a machine in full use


class Node:
    """One machine: `ray start --block` and all that it starts."""

    def __init__(
        self, network: Network, number: int, folder: Path, environment: dict[str, str], head: Node | None
    ) -> None:
        self.number = number
        self.address = network.add(number)
        self.is_head = head is None
        self.gcs_port = head.gcs_port if head is not None else self._port(6379, network)
        self.dashboard_port = head.dashboard_port if head is not None else self._port(8265, network)
        self._network = network
        self._log = folder / f"node-{number}.log"
        own = folder / f"tmp-{number}"
        own.mkdir()
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={self.address}", "--num-gpus=0"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        if head is None:
            command += ["--head", "--num-cpus=0", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}"]
            command += [f"--dashboard-host={self.address}", f"--ray-client-server-port={self._port(10001, network)}"]
        else:
            command += [f"--num-cpus={CPUS_PER_WORKER}", f"--address={head.address}:{head.gcs_port}"]
        if not network.apart:
            command += ["--dashboard-agent-listen-port=0"]
        else:
            # `ip netns exec` gives a mount namespace too: nodes share neither Ray's files nor its sockets.
            there = f"mkdir -p /tmp/ray && mount --bind {shlex.quote(str(own))} /tmp/ray && exec {shlex.join(command)}"
            command = ["ip", "netns", "exec", network.name(number), "sh", "-c", there]
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=environment, start_new_session=True
            )

    @property
    def dashboard(self) -> str:
        return f"http://{self.address}:{self.dashboard_port}"

    def wait_until_up(self) -> bool:
        """Until Ray says so; False where it gave up."""
        deadline_s = time.monotonic() + _LONGEST_START_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if "Ray runtime started" in self.told() and (not self.is_head or self._dashboard_listens()):
                return True
            time.sleep(0.2)
        return False

    def told(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that run on this machine."""
        ids = set(self._network.process_ids(self.number))
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    ids.add(process.pid)
        found = []
        for process_id in ids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(process_id))
        return found

    def runs(self, words: str) -> list[psutil.Process]:
        """Its processes whose command line has these words."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def power_off(self) -> None:
        """Cable out, then every process killed at once: the others hear nothing of it."""
        self._network.unplug(self.number)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End in order, then by force."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    @staticmethod
    def _port(wanted: int, network: Network) -> int:
        """Ray's own port where nobody else can have it, a free one where all nodes share an address."""
        return wanted if network.apart else free_port()

    def _dashboard_listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((self.address, self.dashboard_port)) == 0


class Cluster:
    """A head without CPUs and workers, as many as are wanted at a time."""

    def __init__(self, network: Network, folder: Path, environment: dict[str, str]) -> None:
        self._network, self._folder, self._environment = network, folder, environment
        self._num_started = 0
        self._all: list[Node] = []
        self.workers: list[Node] = []
        self.head = self._start(None)

    def want_workers(self, num_workers: int) -> None:
        """Start machines until there are that many."""
        while len(self.workers) < num_workers:
            self.workers.append(self._start(self.head))

    def lose(self, node: Node) -> None:
        node.power_off()
        self.workers.remove(node)

    def find(self, words: str) -> Node | None:
        """The first worker machine that runs a process of such a command line."""
        return next((node for node in self.workers if node.runs(words)), None)

    def close(self) -> None:
        for node in reversed(self._all):
            if node.process.poll() is None or node.processes():
                node.stop()

    def _start(self, head: Node | None) -> Node:
        for _ in range(_MOST_STARTS):
            node = Node(self._network, self._num_started, self._folder, self._environment, head)
            self._num_started += 1
            self._all.append(node)
            if node.wait_until_up():
                return node
            node.stop()
        raise RuntimeError(f"Ray did not start: {node.told()[-2000:]}")


class Job:
    """A client's command that follows a job: its output in a file, its end within a bounded time."""

    def __init__(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self.started_s = time.monotonic()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )

    def told(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, happened: Callable[[], bool], longest_s: float) -> None:
        """Return as soon as something has happened; the job must not end before."""
        deadline_s = time.monotonic() + longest_s
        while not happened():
            assert self._process.poll() is None, self.told()[-4000:]
            assert time.monotonic() < deadline_s, self.told()[-4000:]
            time.sleep(0.02)

    def finish(self, longest_s: float) -> tuple[int, float]:
        """Exit code, and seconds since it began."""
        try:
            code = self._process.wait(longest_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end: {self.told()[-4000:]}") from None
        return code, time.monotonic() - self.started_s

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
