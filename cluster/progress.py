"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a job log; on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_LINE_INTERVAL_S = 10.0


class StageBar:
    """Counts what a stage has done; safe to call from several threads.

    total: units of work, or None where it is not known. Work that an earlier run did is told by `skip`, so that the
    rate is of this run alone.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, show: Callable[[StageBar], None], clock: Callable
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.num_done = 0
        self.num_skipped = 0
        self._show, self._clock = show, clock
        self._lock = threading.Lock()
        self._start_s = clock()

    def advance(self, num: int = 1) -> None:
        """num more units are done."""
        with self._lock:
            self.num_done += num
            self._show(self)

    def skip(self, num: int) -> None:
        """num units were done before this run."""
        with self._lock:
            self.num_done += num
            self.num_skipped += num
            self._show(self)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start_s

    @property
    def rate(self) -> float:
        """Units a second, those of this run."""
        return (self.num_done - self.num_skipped) / max(self.elapsed_s, 1e-9)

    @property
    def count(self) -> str:
        return f"{self.num_done}/{'?' if self.total is None else self.total} {self.unit}"

    @property
    def speed(self) -> str:
        """'35.2 images/s, 15 s left'; empty before anything is done."""
        if self.num_done <= self.num_skipped or self.elapsed_s <= 0:
            return ""
        text = f"{self.rate:.1f} {self.unit}/s"
        if self.total is not None and self.total > self.num_done:
            text += f", {format_seconds((self.total - self.num_done) / self.rate)} left"
        return text


class Progress:
    """Shows stages and notes.

    stream: where to (stderr when None; tables belong on stdout). A bar is drawn where it is a terminal; elsewhere a
    line at the start, one at most every interval_s, and one at the end.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interval_s: float = _LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s, self._clock = interval_s, clock
        self._lock = threading.RLock()
        self._last_line_s: dict[int, float] = {}
        self._live: Any = None  # the rich display, while a stage is shown on a terminal
        self._num_live = 0

    def note(self, text: str) -> None:
        """A message of its own line, above the bar where there is one."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                self._line(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "images") -> Iterator[StageBar]:
        """Show one stage; its end is told, and where it stopped if it fails."""
        with (
            self._on_terminal(name, total, unit) if self._stream.isatty() else self._in_lines(name, total, unit) as bar
        ):
            yield bar

    @contextlib.contextmanager
    def _in_lines(self, name: str, total: int | None, unit: str) -> Iterator[StageBar]:
        def show(bar: StageBar) -> None:
            now_s = self._clock()
            if now_s - self._last_line_s.get(id(bar), now_s) >= self._interval_s:
                self._last_line_s[id(bar)] = now_s
                self._line(", ".join(filter(None, [f"{name}: {bar.count}", bar.speed])))

        bar = StageBar(name, total, unit, show, self._clock)
        self._last_line_s[id(bar)] = self._clock()
        self._line(f"{name}: {bar.count}")
        try:
            yield bar
        except BaseException:
            self._line(f"{name}: stopped at {bar.count} after {format_seconds(bar.elapsed_s)}")
            raise
        finally:
            del self._last_line_s[id(bar)]
        self._line(_summary(bar))

    @contextlib.contextmanager
    def _on_terminal(self, name: str, total: int | None, unit: str) -> Iterator[StageBar]:
        live = self._open_live()
        task = live.add_task(name, total=total, count="", speed="")

        def show(bar: StageBar) -> None:
            live.update(task, completed=bar.num_done, count=bar.count, speed=bar.speed)

        bar = StageBar(name, total, unit, show, self._clock)
        try:
            yield bar
            self.note(_summary(bar))
        except BaseException:
            self.note(f"{name}: stopped at {bar.count} after {format_seconds(bar.elapsed_s)}")
            raise
        finally:
            live.remove_task(task)
            self._close_live()

    def _open_live(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        with self._lock:
            if self._live is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.fields[count]}"),
                    TextColumn("{task.fields[speed]}"),
                    TimeElapsedColumn(),
                )
                self._live = RichProgress(*columns, console=Console(file=self._stream), transient=True)
                self._live.start()
            self._num_live += 1
            return self._live

    def _close_live(self) -> None:
        with self._lock:
            self._num_live -= 1
            if self._num_live == 0:
                self._live.stop()
                self._live = None

    def _line(self, text: str) -> None:
        with self._lock:
            print(text, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """'0.4 s', '45 s', '3 min 20 s', '2 h 5 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _summary(bar: StageBar) -> str:
    text = f"{bar.name}: {bar.count} in {format_seconds(bar.elapsed_s)}"
    num_here = bar.num_done - bar.num_skipped
    if bar.num_skipped:
        text += f" ({bar.num_skipped} from an earlier run)"
    return f"{text}, {bar.rate:.1f} {bar.unit}/s" if num_here else text
