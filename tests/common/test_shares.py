from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_common.trust.shares import TokenBucket, Usage, max_min_level


@pytest.mark.parametrize(
    ("demands", "capacity", "level"),
    [
        ([], 10, math.inf),
        ([4, 6], 10, math.inf),
        ([4, 7], 10, 6),
        ([1, 100, 100], 9, 4),
        ([100, 100], 0, 0),
        ([2, 2.6, 4, 5], 10, 2.7),
    ],
)
def test_the_level(demands: list[float], capacity: float, level: float) -> None:
    assert max_min_level(demands, capacity) == pytest.approx(level)


@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(0, 3000))
def test_the_level_gives_out_all_that_is_asked_for_and_there(demands: list[int], capacity: int) -> None:
    level = max_min_level(demands, capacity)
    assert sum(min(demand, level) for demand in demands) == pytest.approx(min(sum(demands), capacity))


def test_what_members_use() -> None:
    usage = Usage()
    assert usage.largest() is None
    usage.add("a", 3)
    usage.add("b", 5)
    assert (usage.total, usage["a"], usage["c"], usage.largest(), sorted(usage)) == (8, 3, 0, "b", ["a", "b"])
    assert usage.level(8, "c", 4) == pytest.approx(2.6666667)
    usage.add("b", -5)
    assert usage.of_all() == {"a": 3}


def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("split_common.trust.shares.time.monotonic", lambda: now)
    bucket = TokenBucket(rate=2.0, burst=3.0)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now += 0.5
    assert [bucket.take(), bucket.take()] == [True, False]
    now += 60.0
    assert not bucket.take(3.5)
    assert bucket.take(3.0)
