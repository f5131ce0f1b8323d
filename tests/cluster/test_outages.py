"""outages: order, pauses, bounds and refusals, with a clock of the test's own."""

import logging

import pytest

from cluster import outages
from cluster.outages import FIRST_PAUSE_S, LONGEST_PAUSE_S, Outages, Rejected


class Server:
    """Away or there; remembers what it got, and how often it was asked."""

    def __init__(self) -> None:
        self.away = False
        self.got: list[object] = []
        self.num_calls = 0
        self.now = 0.0

    def take(self, value: object) -> object:
        self.num_calls += 1
        if self.away:
            raise OSError("connection refused for user:secret")
        self.got.append(value)
        return value


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def queue(server: Server) -> Outages:
    return Outages("MLflow", lambda error: str(error).replace("user:secret", "***"), clock=lambda: server.now)


def test_what_waited_follows_in_order(server: Server, queue: Outages) -> None:
    queue.enqueue("one", lambda: server.take(1))
    server.away = True
    queue.enqueue("two", lambda: server.take(2))
    queue.enqueue("three", lambda: server.take(3))
    assert (server.got, server.num_calls, queue.num_waiting) == ([1], 2, 2)  # the third was not even tried
    server.away, server.now = False, FIRST_PAUSE_S
    queue.enqueue("four", lambda: server.take(4))
    assert server.got == [1, 2, 3, 4]
    assert queue.num_waiting == 0


def test_pauses_double_up_to_a_bound(server: Server, queue: Outages) -> None:
    server.away = True
    queue.enqueue("one", lambda: server.take(1))
    pauses = []
    for _ in range(8):
        start = server.now
        while server.num_calls == len(pauses) + 1:
            server.now += 1.0
            queue.flush()
        pauses.append(server.now - start)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_one_warning_an_outage_without_secrets(
    server: Server, queue: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    server.away = True
    with caplog.at_level(logging.INFO):
        for step in range(5):
            server.now += 1000.0
            queue.enqueue("log metrics", lambda step=step: server.take(step))
        server.away, server.now = False, server.now + 1000.0
        queue.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "could not log metrics (connection refused for ***)" in caplog.text
    assert "secret" not in caplog.text


def test_last_try_ignores_the_pause(server: Server, queue: Outages) -> None:
    server.away = True
    queue.enqueue("one", lambda: server.take(1))
    assert not queue.flush()
    assert server.num_calls == 1
    server.away = False
    assert queue.flush(last_try=True)
    assert server.got == [1]


def test_a_refused_call_does_not_hold_up_the_rest(
    server: Server, queue: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> None:
        raise Rejected("no such run")

    queue.enqueue("bad", refused)
    queue.enqueue("good", lambda: server.take(1))
    assert server.got == [1]
    assert "refused to bad: no such run" in caplog.text


def test_the_oldest_are_dropped_and_counted(server: Server, queue: Outages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "MAX_WAITING", 3)
    server.away = True
    for value in range(5):
        queue.enqueue("value", lambda value=value: server.take(value))
    assert (queue.num_waiting, queue.num_dropped) == (3, 2)
    server.away = False
    assert queue.flush(last_try=True)
    assert server.got == [2, 3, 4]


def test_attempt_gives_the_result_or_none(server: Server, queue: Outages) -> None:
    assert queue.attempt("ask", lambda: server.take(7)) == 7
    server.away = True
    assert queue.attempt("ask", lambda: server.take(8)) is None
    assert queue.attempt("ask", lambda: server.take(9)) is None
    assert server.num_calls == 2
