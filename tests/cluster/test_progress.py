"""Plain lines in a log, a bar on a terminal; rates, time left, stops, threads."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.progress import Progress, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_first_last_and_at_most_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    with progress.stage("features", total=100, unit="images") as bar:
        for _ in range(25):
            clock.now_s += 1.0
            bar.advance(4)
    assert stream.getvalue().splitlines() == [
        "features: 0/100 images",
        "features: 40/100 images, 4.0 images/s, 15 s left",
        "features: 80/100 images, 4.0 images/s, 5.0 s left",
        "features: 100/100 images in 25 s, 4.0 images/s",
    ]


def test_skipped_work_does_not_count_for_the_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, interval_s=5, clock=clock).stage("cams", total=100) as bar:
        bar.skip(60)
        clock.now_s += 10
        bar.advance(20)
        assert bar.rate == 2.0
    assert stream.getvalue().splitlines()[1:] == [
        "cams: 80/100 images, 2.0 images/s, 10 s left",
        "cams: 80/100 images in 10 s (60 from an earlier run), 2.0 images/s",
    ]


def test_unknown_total_notes_and_a_stop() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)

    def search() -> None:
        with progress.stage("search", unit="passes") as bar:
            bar.advance()
            progress.note("[bold]inertia 3.5")
            clock.now_s += 65
            raise KeyError

    with pytest.raises(KeyError):
        search()
    assert stream.getvalue().splitlines() == [
        "search: 0/? passes",
        "[bold]inertia 3.5",
        "search: stopped at 1/? passes after 1 min 5 s",
    ]


def test_threads_lose_no_count() -> None:
    with Progress(io.StringIO()).stage("x", total=8000) as bar, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bar.advance(), range(8000)))
        assert bar.num_done == 8000


def test_a_terminal_gets_a_bar_that_goes_and_a_line_that_stays() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.stage("features", total=10) as outer, progress.stage("inner", total=2, unit="passes") as bar:
        outer.advance(4)
        bar.advance(2)
        progress.note("[bold]half way")
        bar.advance(0)
    text = stream.getvalue()
    assert "[bold]half way" in text
    assert "inner: 2/2 passes in" in text
    assert "features: 4/10 images in" in text
    assert progress._live is None
    with pytest.raises(ValueError, match="no"), progress.stage("again", total=1):
        raise ValueError("no")
    assert "again: stopped at 0/1 images" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (45.4, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (59.7, "1 min 0 s")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
