"""A network of machines on one machine: a namespace a node, with an address of its own, joined by a bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess


class Network:
    """Addresses for nodes: 10.231.X.1 is this machine, 10.231.X.(10 + n) node n; all end with close().

    Where namespaces are not allowed, `apart` is false and every node lives at 127.0.0.1.
    """

    def __init__(self) -> None:
        self._prefix = f"sc{os.getpid() % 100_000}"
        self._net = f"10.231.{os.getpid() % 250 + 1}"
        self._names: list[str] = []
        self.apart = self._make_bridge()
        self.host = f"{self._net}.1" if self.apart else "127.0.0.1"

    def add(self, number: int) -> str:
        """A namespace for node `number`, its cable plugged in; returns its address."""
        if not self.apart:
            return self.host
        name, cable, address = self.name(number), self._cable(number), f"{self._net}.{10 + number}"
        _ip("netns", "add", name)
        self._names.append(name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return address

    def name(self, number: int) -> str:
        return f"{self._prefix}n{number}"

    def unplug(self, number: int) -> None:
        """From now on nothing reaches the node, and nobody is told."""
        if self.apart:
            _ip("link", "set", self._cable(number), "down")

    def process_ids(self, number: int) -> list[int]:
        """Processes inside the node's namespace."""
        if not self.apart:
            return []
        told = subprocess.run(["ip", "netns", "pids", self.name(number)], capture_output=True, text=True)
        return [int(line) for line in told.stdout.split()]

    def close(self) -> None:
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)  # its cable goes with it
        if self.apart:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "delete", self._bridge)

    def _make_bridge(self) -> bool:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        probe = f"{self._prefix}p"
        try:
            _ip("netns", "add", probe)
            _ip("netns", "delete", probe)
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self._net}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except subprocess.CalledProcessError:
            subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)
            return False
        return True

    @property
    def _bridge(self) -> str:
        return f"{self._prefix}br"

    def _cable(self, number: int) -> str:
        return f"{self._prefix}c{number}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
