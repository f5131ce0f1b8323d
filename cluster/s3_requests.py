"""Bounded, logged retries around S3 requests, and their errors as one clear line."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.local_files import MissingFileError, StorageError

logger = logging.getLogger("subcat")

S3_SCHEME = "s3://"
_T = TypeVar("_T")
_RETRY_WAITS_S = (0.2, 0.5, 1.0, 2.0)  # a first attempt, and a retry after each of these


def call_s3(filesystem: Any, action: str, uri: str, call: Callable[[Any], _T], *, check_bucket: bool = False) -> _T:
    """Run a request with bounded retries; every failure is a StorageError of one line.

    filesystem: the s3fs client. call: the request, given that client; safe to repeat.
    check_bucket: for requests whose "nothing there" may also mean that there is no bucket; asked once a process.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    for attempt in range(len(_RETRY_WAITS_S) + 1):
        try:
            if check_bucket:
                _require_bucket(filesystem, uri)
            try:
                return call(filesystem)
            except FileNotFoundError:
                _require_bucket(filesystem, uri)
                raise
        except StorageError:
            raise
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            reason = _final_reason(error)
            if reason is None and attempt < len(_RETRY_WAITS_S):
                wait_s = _RETRY_WAITS_S[attempt]
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
