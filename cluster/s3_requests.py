"""Bounded, logged retries around S3 requests, and their errors as one clear line."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.local_files import MissingFileError, StorageError

logger = logging.getLogger("subcat")

S3_SCHEME = "s3://"
_T = TypeVar("_T")
# A first attempt, and a retry after each of these: two minutes are longer than most restarts of a server.
_RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
_FIRST_WAITS_S = (0.2, 0.5, 1.0, 2.0)  # instead, where no answer has ever come: most often a wrong endpoint
_JITTER = 0.25  # of a wait, more or less, so that the workers of a run do not all come back at once


def call_s3(filesystem: Any, action: str, uri: str, call: Callable[[Any], _T], *, check_bucket: bool = False) -> _T:
    """Run a request with bounded retries; every failure is a StorageError of one line.

    They go on for two minutes; for a few seconds where nothing answers, and nothing has since the run began.
    filesystem: the s3fs client. call: the request, given that client; safe to repeat.
    check_bucket: for requests whose "nothing there" may also mean that there is no bucket; asked once a process.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    for attempt in itertools.count():
        try:
            if check_bucket:
                _require_bucket(filesystem, uri)
            try:
                result = call(filesystem)
            except FileNotFoundError:
                _require_bucket(filesystem, uri)
                raise
        except StorageError:
            raise
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            if not _is_unanswered(error):
                filesystem._subcat_answered = True
            reason = _final_reason(error)
            waits_s = _RETRY_WAITS_S if _has_answered(filesystem) else _FIRST_WAITS_S
            if reason is None and attempt < len(waits_s):
                wait_s = waits_s[attempt] * random.uniform(1 - _JITTER, 1 + _JITTER)
                logger.warning("%s: cannot %s yet (%s); again in %.1f s", uri, action, _first_line(error), wait_s)
                time.sleep(wait_s)
                continue
            kind = MissingFileError if isinstance(error, FileNotFoundError) else StorageError
            reason = reason or f"failed {attempt + 1} times, last with: {_first_line(error)}; check the S3 endpoint"
            raise kind(f"{uri}: cannot {action}: {reason}") from error
        filesystem._subcat_answered = True
        return result
    raise AssertionError("the last attempt returns or raises")


def _is_unanswered(error: Exception) -> bool:
    """Whether no server may be there at all: nobody listens, the name is unknown, or nothing is heard."""
    import aiohttp
    from botocore.exceptions import ConnectionError, HTTPClientError

    return isinstance(error, (ConnectionError, HTTPClientError, TimeoutError, aiohttp.ClientConnectionError))


def _has_answered(filesystem: Any) -> bool:
    """Whether the server has ever answered this process, or the driver that started this process as a Ray worker."""
    ray = sys.modules.get("ray")  # a Ray worker has it; a process without it need not load it
    in_worker = ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return in_worker or getattr(filesystem, "_subcat_answered", False)


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
