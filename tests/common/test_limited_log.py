"""Lines that a member causes: so many, and then none but how many there were."""

from __future__ import annotations

import logging

import pytest

from split_common.trust.limited_log import LimitedLog


def test_a_member_fills_no_log_and_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("limited"), rate=1e-9, burst=2)
    with caplog.at_level(logging.INFO, "limited"):
        for number in range(100):
            log.info("hog", "hog %d", number)
        log.warning("b", "%s is here", "b")
    assert caplog.messages == ["hog 0", "hog 1", "b is here"]


def test_what_is_left_out_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("split_common.trust.shares.time.monotonic", lambda: now)
    log = LimitedLog(logging.getLogger("limited"), rate=1.0, burst=1)
    with caplog.at_level(logging.INFO, "limited"):
        for number in range(4):
            log.error("hog", "hog %d", number)
        now = 1.0
        log.error("hog", "hog again")
        now = 2.0
        log.error("hog", "hog again")
    assert caplog.messages == ["hog 0", "hog again (3 lines of hog before it were left out)", "hog again"]


def test_lines_below_the_level_take_no_place(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("limited"), rate=1e-9, burst=1)
    with caplog.at_level(logging.WARNING, "limited"):
        for _ in range(9):
            log.info("a", "not shown")
        log.warning("a", "shown")
    assert caplog.messages == ["shown"]
