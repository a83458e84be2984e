"""What sessions are called: request ids, and the keys that broker and worker see."""

from __future__ import annotations

import re

import pytest

from split_common.errors import ConfigError
from split_device.sessions import identity
from split_device.sessions.identity import MAX_REQUEST_ID, SessionNames, check_request_id, new_request_id


def test_one_id_twice_is_two_sessions() -> None:
    names = SessionNames()
    named = [names.name("req-1", index) for index in (0, 0, 1, 1)] + [
        names.name("req-2"),
        SessionNames().name("req-1"),
    ]
    assert len({each.key for each in named}) == len(named)
    assert [each.number for each in named[:5]] == [1, 2, 3, 4, 5]
    assert {each.request_id for each in named} == {"req-1", "req-2"}
    assert all(len(each.key) == 16 and each.label == each.key.hex()[:8] for each in named)
    assert named[0].on_wire(True) == named[0].key
    assert named[0].on_wire(False) == 1


def test_a_key_depends_on_the_id_the_choice_and_the_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity.secrets, "token_bytes", bytes)
    one, other = SessionNames(), SessionNames()
    assert one.name("other").key != one.name("req", 1).key == other.name("req", 1).key
    assert one.name("req", 1).key == other.name("req", 1).key


def test_counts_are_bounded_and_keys_stay_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_COUNTED", 3)
    names = SessionNames()
    keys = [names.name(f"req-{index % 5}").key for index in range(100)]
    assert len(set(keys)) == 100
    assert len(names._uses) <= 3


def test_ids_are_drawn_where_none_is_given() -> None:
    names = SessionNames()
    assert names.name().request_id != names.name().request_id
    assert re.fullmatch("[0-9a-f]{32}", new_request_id())


@pytest.mark.parametrize(
    "wrong", ["", " ", "a b", "tab\t", "line\n", "ü", "\x7f", "x" * (MAX_REQUEST_ID + 1), 7, None]
)
def test_what_is_not_a_request_id_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="invalid request id"):
        check_request_id(wrong)  # type: ignore[arg-type]


def test_request_ids_are_visible_characters() -> None:
    for right in ("x", "x" * MAX_REQUEST_ID, "batch/7:line=3", '"{}~!'):
        assert check_request_id(right) == right
