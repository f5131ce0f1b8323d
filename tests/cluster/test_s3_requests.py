"""Retries around S3: bounded, logged, and around every request."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import socketserver
import threading
from typing import Any

import pyarrow as pa
import pytest

from cluster import s3_requests
from cluster.storage import Storage, StorageError
from tests.conftest import S3_BUCKET

TABLE = pa.table({"image_id": ["a", "b"], "value": pa.array([1, 2], pa.int32())})


class Unsteady(socketserver.StreamRequestHandler):
    """Answers 503 to the first connections, and hands the later ones on to the S3 server."""

    def handle(self) -> None:
        server: Any = self.server
        if server.num_refusals > 0:
            server.num_refusals -= 1
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        with socket.create_connection(server.behind) as behind:
            threading.Thread(target=self._pass_on, args=(behind, self.connection), daemon=True).start()
            self._pass_on(self.connection, behind)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)


def test_a_footer_outlasts_a_server_that_is_away_for_a_while(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"s3://{S3_BUCKET}/unsteady")
    storage.write_table("t.parquet", TABLE)
    monkeypatch.setattr(s3_requests, "_RETRY_WAITS_S", (0.0, 0.0, 0.0))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Unsteady) as server:
        server.daemon_threads = True
        server.behind = ("127.0.0.1", int(s3_server.rsplit(":", 1)[1]))  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        server.num_refusals = 2  # type: ignore[attr-defined]
        try:
            assert storage.read_footer("t.parquet") == (2, TABLE.schema)
            assert server.num_refusals == 0  # type: ignore[attr-defined]
        finally:
            server.shutdown()


def test_retries_are_bounded_and_logged(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_requests, "_RETRY_WAITS_S", (0.0, 0.0))
    num_calls = 0

    def flaky(filesystem: object) -> bytes:
        nonlocal num_calls
        num_calls += 1
        if num_calls < 3:
            raise OSError(errno.EBUSY, "Please reduce your request rate.")
        return b"at last"

    with caplog.at_level(logging.WARNING, logger="subcat"):
        assert s3_requests.call_s3(None, "read", "s3://b/x", flaky) == b"at last"
    assert [r.getMessage() for r in caplog.records] == [
        "s3://b/x: cannot read yet ([Errno 16] Please reduce your request rate.); again in 0.0 s"
    ] * 2
    num_calls = -10
    with pytest.raises(StorageError, match=r"^s3://b/x: cannot read: failed 3 times, last with: .* request rate"):
        s3_requests.call_s3(None, "read", "s3://b/x", flaky)
    assert num_calls == -7
