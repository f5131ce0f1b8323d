"""Errors as values: class, text and errno come out as they went in."""

from __future__ import annotations

import errno

import pytest

from cluster.reading_errors import ReadFailure
from cluster.storage import StorageError
from cluster.training_ray import lasting_kind


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "raised", "lasting"),
    [
        (ValueError("no class 9"), ValueError, "ValueError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ValueError, "ValueError"),
        (KeyError("labels"), KeyError, "RuntimeError"),
        (ZeroDivisionError("division by zero"), ArithmeticError, "RuntimeError"),
        (MemoryError("much"), Exception, None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), OSError, None),
        (caused(StorageError("s3://b/k: failed 5 times"), OSError(errno.EIO, "broken")), StorageError, None),
        (caused(StorageError("s3://b/k: access denied"), PermissionError("denied")), StorageError, "StorageError"),
    ],
)
def test_an_error_comes_out_as_it_went_in(error: Exception, raised: type[Exception], lasting: str | None) -> None:
    try:
        raise error
    except Exception as caught:
        told = ReadFailure.of(caught).to_json()
    with pytest.raises(raised) as again:
        ReadFailure.from_json(told).reraise()
    assert type(again.value) is raised
    assert str(again.value) == str(error)
    assert "test_reading_errors.py" in again.value.__notes__[0]
    assert lasting_kind(again.value) == lasting == lasting_kind(error)
