"""Work that waits while a server is away: a bounded queue behind a circuit breaker, which never raises."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0
MAX_WAITING = 5000


class Rejected(Exception):  # noqa: N818 (an answer of the server, not a fault of it)
    """The server understood the call and refused it; a second try would be refused too."""


class Outages:
    """Runs calls to a server that may be away. Thread-safe.

    After a failed call nothing is tried for `FIRST_PAUSE_S`, doubling up to `LONGEST_PAUSE_S`; queued calls wait, in
    order, and the oldest are dropped past `MAX_WAITING`. One warning when an outage begins, one line when it ends; one
    warning a kind of call that the server refuses.
    server: how the server is called in the log. worded: exception -> text without secrets.
    """

    def __init__(
        self, server: str, worded: Callable[[BaseException], str] = str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.server = server
        self.num_dropped = 0
        self._worded = worded
        self._clock = clock
        self._lock = threading.RLock()
        self._waiting: collections.deque[tuple[str, Callable[[], object]]] = collections.deque()
        self._refused: set[str] = set()
        self._pause_s = 0.0
        self._retry_at = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_away(self) -> bool:
        """Whether the last call failed and its pause is not over."""
        return self._pause_s > 0.0 and self._clock() < self._retry_at

    def attempt(self, what: str, call: Callable[[], _Result]) -> _Result | None:
        """The call's result, or None when the server is away, fails or refuses."""
        with self._lock:
            if self.is_away:
                return None
            try:
                result = call()
            except Rejected as error:
                if what not in self._refused:
                    _log.warning("%s refused to %s: %s", self.server, what, self._worded(error))
                self._refused.add(what)
                return None
            except Exception as error:
                self._failed(what, error)
                return None
            self._works()
            return result

    def enqueue(self, what: str, call: Callable[[], object]) -> None:
        """Do the call now, after those that wait; or let it wait."""
        with self._lock:
            self._waiting.append((what, call))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.num_dropped += 1
            self.flush()

    def flush(self, *, last_try: bool = False) -> bool:
        """Do what waits, in order; last_try ignores the pause. True when nothing waits any more."""
        with self._lock:
            if last_try:
                self._retry_at = 0.0
            while self._waiting and not self.is_away:
                what, call = self._waiting[0]
                self.attempt(what, call)
                if self.is_away:
                    break
                self._waiting.popleft()
            return not self._waiting

    def _failed(self, what: str, error: Exception) -> None:
        if self._pause_s == 0.0:
            _log.warning(
                "%s could not %s (%s); the run goes on and tries again later", self.server, what, self._worded(error)
            )
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._retry_at = self._clock() + self._pause_s

    def _works(self) -> None:
        if self._pause_s:
            _log.info("%s answers again", self.server)
        self._pause_s = 0.0
