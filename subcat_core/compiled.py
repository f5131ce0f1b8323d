"""One way to compile hot loops: numba, without the GIL, kept on disk between processes where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

_F = TypeVar("_F", bound=Callable[..., Any])

# Not fast-math as a whole: sums keep the order that is written, nan and infinity their meaning.
_FASTMATH = {"contract", "nsz", "arcp"}


def compiled(function: _F) -> _F:
    """numba njit at first call; the cache on disk is left out where no folder can be written (read-only images)."""
    try:
        return numba.njit(cache=True, nogil=True, fastmath=_FASTMATH, error_model="numpy")(function)  # type: ignore[return-value]
    except RuntimeError:
        return numba.njit(nogil=True, fastmath=_FASTMATH, error_model="numpy")(function)  # type: ignore[return-value]
