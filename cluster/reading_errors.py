"""Errors of a process that reads, as values: on their way Ray Data loses their class, and a DataLoader their cause."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import traceback
from typing import NoReturn

from cluster.storage import StorageError

_RAISED: dict[str, type[Exception]] = {
    known.__name__: known
    for known in (
        *(ValueError, TypeError, KeyError, IndexError, LookupError, AttributeError, ArithmeticError),
        *(AssertionError, ImportError, StorageError, OSError, RuntimeError, Exception),
    )
}


@dataclasses.dataclass(frozen=True)
class ReadFailure:
    """kind: the class of the error, or its nearest base in _RAISED; error_number: of the OSError behind it, or 0."""

    kind: str
    text: str
    error_number: int
    trace: str

    @classmethod
    def of(cls, error: Exception) -> ReadFailure:
        """Call it where the error is handled: it takes the trace from there."""
        kind = next(base.__name__ for base in type(error).__mro__ if _RAISED.get(base.__name__) is base)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return cls(kind, text, _error_number(error), traceback.format_exc())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ReadFailure:
        return cls(**json.loads(text))

    def reraise(self) -> NoReturn:
        """Raise the error again, with the trace of the other process as a note."""
        error = _RAISED[self.kind](self.text)
        error.add_note(f"in the process that read:\n{self.trace}")
        raise error from OSError(self.error_number, os.strerror(self.error_number)) if self.error_number else None


def _error_number(error: BaseException | None) -> int:
    """The first errno along the causes of an OSError; EACCES for a PermissionError without one, as s3fs raises it."""
    while isinstance(error, OSError):
        if error.errno or isinstance(error, PermissionError):
            return error.errno or errno.EACCES
        error = error.__cause__
    return 0
