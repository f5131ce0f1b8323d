"""A proxy before the S3 server that counts what passes, and fails when told: 503, silence, cut connections."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
SILENCE_S = 1.0


class _Handler(socketserver.StreamRequestHandler):
    server: UnsteadyServer

    def handle(self) -> None:
        fault = self.server.take_fault()
        if fault == "503":
            self.rfile.readline()
            self.wfile.write(REFUSAL)
        elif fault == "silence":
            time.sleep(SILENCE_S)
        elif fault != "cut":
            self._pass_on_both(last_bytes=1000 if fault == "cut in the middle" else None)

    def _pass_on_both(self, last_bytes: int | None) -> None:
        with socket.create_connection(self.server.behind) as behind:
            self.server.connections += [behind, self.connection]
            threading.Thread(target=self._pass_on, args=(behind, self.connection, last_bytes), daemon=True).start()
            self._pass_on(self.connection, behind, None)

    def _pass_on(self, source: socket.socket, target: socket.socket, last_bytes: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if target is self.connection:
                    self.server.num_bytes += len(data)
                else:
                    self.server.num_parts += data.count(b"partNumber=")
                target.sendall(data[:last_bytes])
                if last_bytes is not None:
                    target.shutdown(socket.SHUT_RDWR)
                    return


class UnsteadyServer(socketserver.ThreadingTCPServer):
    """num_bytes: sent to clients so far; num_parts: of multipart uploads that clients have sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        self.num_bytes, self.num_parts, self.num_faults = 0, 0, 0
        self.fault = ""
        self.connections: list[socket.socket] = []
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, fault: str, num_times: int) -> None:
        """The next connections: "503", "silence", "cut" or "cut in the middle"; those that are open are cut."""
        with self._lock:
            self.fault, self.num_faults = fault, num_times
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections = []

    def take_fault(self) -> str:
        """What the next connection has to do."""
        with self._lock:
            if not self.num_faults:
                return ""
            self.num_faults -= 1
            return self.fault


@contextlib.contextmanager
def unsteady_server(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnsteadyServer]:
    """The proxy, as the S3 endpoint of this process; retries follow at once, and silence is noticed after a second."""
    for waits in ("_RETRY_WAITS_S", "_FIRST_WAITS_S"):
        monkeypatch.setattr(f"cluster.s3_requests.{waits}", (0.0,) * 4)
    monkeypatch.setattr("cluster.storage._READ_TIMEOUT_S", 1.0)
    with UnsteadyServer(endpoint) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        try:
            yield server
        finally:
            server.shutdown()
