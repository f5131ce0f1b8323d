"""Retries around S3: bounded, logged, and around every request."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from cluster import s3_requests
from cluster.storage import MissingFileError, StorageError


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
        assert s3_requests.call_s3(SimpleNamespace(), "read", "s3://b/x", flaky) == b"at last"
    assert [r.getMessage() for r in caplog.records] == [
        "s3://b/x: cannot read yet ([Errno 16] Please reduce your request rate.); again in 0.0 s"
    ] * 2
    num_calls = -10
    with pytest.raises(StorageError, match=r"^s3://b/x: cannot read: failed 3 times, last with: .* request rate"):
        s3_requests.call_s3(SimpleNamespace(), "read", "s3://b/x", flaky)
    assert num_calls == -7


class SlowDown:
    """A client that is told to slow down while it looks for the bucket, as often as it says."""

    def __init__(self, num_refusals: int) -> None:
        self.num_refusals = num_refusals

    def call_s3(self, method: str, **names: str) -> None:
        self.num_refusals -= 1
        if self.num_refusals >= 0:
            raise OSError(errno.EBUSY, "Please reduce your request rate.")

    def read(self) -> bytes:
        raise FileNotFoundError("x")


@pytest.mark.parametrize("check_bucket", [False, True])
def test_looking_for_the_bucket_is_retried_and_worded(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, check_bucket: bool
) -> None:
    monkeypatch.setattr(s3_requests, "_RETRY_WAITS_S", (0.0, 0.0))

    def read(num_refusals: int) -> Any:
        client = SlowDown(num_refusals)
        return s3_requests.call_s3(client, "read", "s3://b/x", SlowDown.read, check_bucket=check_bucket)

    with pytest.raises(MissingFileError, match=r"^s3://b/x: cannot read: no such object; check the URI$"):
        read(2)
    with pytest.raises(StorageError, match=r"^s3://b/x: cannot read: failed 3 times, last with: .* request rate"):
        read(3)


def test_an_outage_of_a_minute_is_outlasted_and_a_server_that_never_answered_is_told_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(s3_requests, "time", SimpleNamespace(sleep=waits.append))
    client = SimpleNamespace()

    def refused(filesystem: object) -> bytes:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

    with pytest.raises(StorageError, match=r"^s3://b/x: cannot read: failed 5 times, last with: Could not connect"):
        s3_requests.call_s3(client, "read", "s3://b/x", refused)
    assert 2 < sum(waits) < 5
    waits.clear()
    assert s3_requests.call_s3(client, "read", "s3://b/x", lambda _: b"answer") == b"answer"
    with pytest.raises(StorageError, match=r"^s3://b/x: cannot read: failed 10 times, last with: Could not connect"):
        s3_requests.call_s3(client, "read", "s3://b/x", refused)
    assert 60 < sum(waits) < 180
    assert len(set(waits[-3:])) == 3, "jitter tells equal waits apart"
