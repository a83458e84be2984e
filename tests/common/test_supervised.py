"""Where the errors of a transport's threads end: counted, logged seldom, and never the end of a thread."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest

from split_common.errors import Malformed
from split_common.transport.supervised import Supervisor, handled
from wiretap import LATE


def fail(error: Exception) -> None:
    raise error


def test_what_a_message_breaks_is_counted_by_its_kind() -> None:
    counters = Counter[str]()
    assert handled(counters, lambda: 7) == 7
    assert handled(counters, fail, Malformed("x")) is None
    assert handled(counters, fail, ZeroDivisionError("x")) is None
    assert counters == {"Malformed": 1, "HandlerError": 1}


def test_an_act_that_fails_is_reported_and_counted() -> None:
    counters = Counter[str]()
    supervisor = Supervisor("a test", counters, threading.Event(), pause=0.0)
    assert supervisor.run(lambda: None)
    assert not supervisor.run(fail, Malformed("x"))
    assert not supervisor.run(fail, ZeroDivisionError("x"))
    assert counters == {"Malformed": 1, "failures": 1}


def test_a_flood_of_failures_is_logged_seldom(caplog: pytest.LogCaptureFixture) -> None:
    counters = Counter[str]()
    supervisor = Supervisor("a test", counters, threading.Event(), pause=0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            supervisor.run(fail, ZeroDivisionError("x"))
            handled(counters, fail, Malformed("x"))
    assert counters == {"failures": 100, "Malformed": 100}
    # The 1st, 2nd, 4th, … 64th of each.
    assert len(caplog.records) == 2 * 7


def test_a_loop_that_fails_runs_again_and_ends_when_it_returns() -> None:
    counters, tries = Counter[str](), iter([Malformed("x"), ZeroDivisionError("x")])

    def loop() -> None:
        if (error := next(tries, None)) is not None:
            raise error

    thread = Supervisor("a test", counters, threading.Event(), pause=0.0).start(loop, "test")
    thread.join(LATE)
    assert not thread.is_alive()
    assert counters == {"Malformed": 1, "failures": 1}


def test_a_loop_that_fails_while_all_is_closing_ends() -> None:
    counters, closing = Counter[str](), threading.Event()
    supervisor = Supervisor("a test", counters, closing, pause=600.0)

    def loop() -> None:
        raise ZeroDivisionError

    thread = supervisor.start(loop, "test")
    closing.set()
    thread.join(LATE)
    assert not thread.is_alive()
