"""Bounded, logged retries around S3 requests, and their errors as one clear line."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from cluster.local_files import MissingFileError, StorageError

logger = logging.getLogger("subcat")

S3_SCHEME = "s3://"
_T = TypeVar("_T")
_RETRY_WAITS_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # a first attempt, and a retry after each: a minute in all
_NUM_FIRST_RETRIES = 4
_in_first_contact: ContextVar[bool] = ContextVar("in_first_contact", default=False)


@contextlib.contextmanager
def first_contact() -> Iterator[None]:
    """Inside it, requests of this thread are given up after seconds: the endpoint may be a wrong one.

    Elsewhere a server that is started again is waited for, a minute at most.
    """
    token = _in_first_contact.set(True)
    try:
        yield
    finally:
        _in_first_contact.reset(token)


def call_s3(filesystem: Any, action: str, uri: str, call: Callable[[Any], _T], *, check_bucket: bool = False) -> _T:
    """Run a request with bounded retries; every failure is a StorageError of one line.

    filesystem: the s3fs client. call: the request, given that client; safe to repeat.
    check_bucket: for requests whose "nothing there" may also mean that there is no bucket; asked once a process.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    waits_s = _RETRY_WAITS_S[:_NUM_FIRST_RETRIES] if _in_first_contact.get() else _RETRY_WAITS_S
    for attempt in range(len(waits_s) + 1):
        try:
            if check_bucket:
                _require_bucket(filesystem, uri)
            return call(filesystem)
        except StorageError:
            raise
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            if isinstance(error, FileNotFoundError) and not check_bucket:
                _require_bucket(filesystem, uri)
            reason = _final_reason(error)
            if reason is None and attempt < len(waits_s):
                wait_s = waits_s[attempt]
                logger.warning("%s: cannot %s yet (%s); again in %.1f s", uri, action, _first_line(error), wait_s)
                time.sleep(wait_s)
                continue
            kind = MissingFileError if isinstance(error, FileNotFoundError) else StorageError
            reason = reason or f"failed {attempt + 1} times, last with: {_first_line(error)}; check the S3 endpoint"
            raise kind(f"{uri}: cannot {action}: {reason}") from error
    raise AssertionError("the last attempt returns or raises")


def _final_reason(error: Exception) -> str | None:
    """Why another attempt would not help, with a remedy; None where it might."""
    from botocore.exceptions import (
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return (
            "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a role"
        )
    if isinstance(error, ProfileNotFound):
        return f"{_first_line(error)}; check AWS_PROFILE"
    if isinstance(error, ParamValidationError):
        return f"{' '.join(str(error).split())}; check the bucket and the prefix"
    if isinstance(error, FileNotFoundError):
        return "no such object; check the URI"
    if isinstance(error, PermissionError):
        return f"access denied ({_first_line(error)}); check the keys, the region and the policy of the bucket"
    if isinstance(error, (ConnectionError, HTTPClientError, TimeoutError)):
        return None
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EISDIR):
        return f"the server refused: {_first_line(error)}; check the endpoint, the region and the URI"
    return None


def _require_bucket(filesystem: Any, uri: str) -> None:
    """StorageError where the bucket of a URI does not exist; whatever else is wrong shows in the request itself."""
    bucket = uri.removeprefix(S3_SCHEME).split("/", 1)[0]
    known = filesystem.__dict__.setdefault("_subcat_buckets", set())
    if bucket in known:
        return
    try:
        filesystem.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError as error:
        raise StorageError(
            f"{S3_SCHEME}{bucket}: no such bucket; create it or check the name and the endpoint"
        ) from error
    except PermissionError:
        pass  # keys may reach the objects of a bucket and not the bucket
    known.add(bucket)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
