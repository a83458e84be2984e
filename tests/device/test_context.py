"""Values that are handed past a library's code."""

from __future__ import annotations

import threading

import pytest

from split_device.models.context import CallContext

depths: CallContext[list[int]] = CallContext("test")


def test_calls_are_nested() -> None:
    assert depths.get() is None
    with depths.entered([1]):
        with depths.entered([2]):
            assert depths.get() == [2]
        assert depths.get() == [1]
    assert depths.get() is None


def test_a_call_that_fails_is_left() -> None:
    with pytest.raises(ZeroDivisionError), depths.entered([1]):
        raise ZeroDivisionError
    assert depths.get() is None


def test_what_was_entered_and_never_left_ends_with_the_call_around_it() -> None:
    outer: list[int] = []
    with depths.entered(outer):
        depths.enter([2])
        depths.leave([2])  # equal, but another one
        assert depths.get() == [2]
    assert depths.get() is None


def test_threads_do_not_see_each_others_calls() -> None:
    seen: list[object] = []
    with depths.entered([1]):
        thread = threading.Thread(target=lambda: seen.append(depths.get()))
        thread.start()
        thread.join()
    assert seen == [None]
