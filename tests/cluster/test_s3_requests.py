"""Retries around S3: bounded, logged, and around every request."""

from __future__ import annotations

import errno
import logging

import pytest

from cluster import s3_requests
from cluster.storage import StorageError


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


def test_the_first_contact_gives_up_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 55 <= sum(s3_requests._RETRY_WAITS_S) <= 65  # what a restarted server may take
    monkeypatch.setattr(s3_requests, "_RETRY_WAITS_S", (0.0,) * len(s3_requests._RETRY_WAITS_S))

    def away(filesystem: object) -> bytes:
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    with pytest.raises(StorageError, match="failed 9 times"):
        s3_requests.call_s3(None, "read", "s3://b/x", away)
    with s3_requests.first_contact(), pytest.raises(StorageError, match="failed 5 times"):
        s3_requests.call_s3(None, "read", "s3://b/x", away)
    with pytest.raises(StorageError, match="failed 9 times"):
        s3_requests.call_s3(None, "read", "s3://b/x", away)
