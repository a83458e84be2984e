"""Shares of a worker: what one member takes, whatever its devices do, leaves the others theirs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from split_common.errors import Busy
from split_common.protocol import headers, payloads
from split_common.trust.shares import TokenBuckets
from split_worker import repeats as repeats_module
from split_worker.compute import ComputeLoop
from split_worker.limits import WorkerLimits
from split_worker.repeats import Repeats
from split_worker.requests import REQUEST_BYTES, PendingRequest
from split_worker.sessions import Session, SessionTable


class State:
    """A session's state that holds some tokens of KV memory."""

    def __init__(self, tokens: float = 0.0) -> None:
        self.held_tokens = tokens
        self.sequences = [self]

    @property
    def holds_memory(self) -> bool:
        return self.held_tokens > 0


def held(states: Sequence[State]) -> float:
    return sum(state.held_tokens for state in states)


#: Memory in which nothing is shared.
STORE: Any = SimpleNamespace(sequence_tokens=0, held_by=held, freed_by=held)


class Table:
    """A table of sessions of members that are named by one letter, and the KV memory that they hold."""

    def __init__(self, memory: int | None = None, **limits: Any) -> None:
        self.table = SessionTable(WorkerLimits(**limits), STORE)
        self.memory = memory
        self.number = 0

    def open(self, member: str, tokens: int = 0) -> Session[Any]:
        """Opens a session whose first step has so many tokens, which it holds from then on."""
        self.number += 1
        channel: Any = SimpleNamespace(epoch_keys=lambda *_: None, peer=SimpleNamespace(name=member))
        state: Any = State()
        session = self.table.open((member.encode() * 8, 1, self.number, 0), channel, state, self.free(), tokens)
        session.state.held_tokens = tokens
        return session

    def free(self) -> int | None:
        held = sum(session.state.held_tokens for session in self.table._sessions.values())
        return None if self.memory is None else int(self.memory - held)

    def members(self) -> str:
        return "".join(sorted(session.member for session in self.table._sessions.values()))


def answer(seq: int, size: int) -> tuple[headers.Relay, bytes]:
    return headers.Relay(bytes(8), bytes(8), headers.RelayKind.REPLY, 1, 1, 0, seq, 1), bytes(size)


# --- sessions ----------------------------------------------------------------------------------------------


def test_the_member_with_most_sessions_gives_way_and_no_further_than_to_equal_shares() -> None:
    table = Table(max_sessions=4)
    hog = [table.open("h") for _ in range(4)]
    with pytest.raises(Busy):
        table.open("h")
    # A worker that is full of one member's sessions has room for another's.
    assert table.table.room(None) == 1
    table.open("a")
    assert table.members() == "ahhh"
    assert table.table.get(hog[3].id) is None
    table.open("a")
    for member in "ah":
        with pytest.raises(Busy):
            table.open(member)
    table.open("b")
    assert len(table.members()) == 4
    assert set(table.members()) == set("abh")


def test_a_member_that_opens_very_many_sessions_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    with caplog.at_level(logging.INFO, "split_worker"):
        for _ in range(1000):
            table.table.close(table.open("h").id)
        table.open("a")
    assert 1 < len(caplog.messages) < 1000
    assert caplog.messages[-1].endswith("of device a opened")


def test_one_session_for_each_is_full() -> None:
    table = Table(max_sessions=2)
    table.open("a")
    table.open("b")
    with pytest.raises(Busy):
        table.open("c")
    assert table.table.room(None) == 0


def test_the_member_with_most_memory_gives_way() -> None:
    table = Table(memory=1000, growth=10)
    first = table.open("h", 600)
    second = table.open("h", 300)
    second.state.held_tokens = 400
    for session in (first, second):
        assert session.admit(0)
    assert table.table.room(0) == 1
    honest = table.open("a", 300)
    # Its first step finds no memory, and takes that of the newest session of the member that has most.
    assert table.table.victims(honest, 300) == [second]
    table.table.evict(second)
    # Of two members with about as much neither takes the other's, so that they do not evict each other in turns.
    honest.state.held_tokens = 500
    first.state.held_tokens = 500
    assert not table.table.victims(honest, 100)
    assert not table.table.victims(first, 100)
    with pytest.raises(Busy):
        table.open("h", 20)


def test_what_is_kept_for_copies_goes_first() -> None:
    table = Table(memory=1100, growth=10, max_sessions=8)
    kept = [table.open(member, tokens) for member, tokens in (("a", 300), ("h", 100), ("h", 300))]
    live = table.open("h", 300)
    for session in (*kept, live):
        session.admit(0)
        table.table.answered(session, answer(0, 50))
    for session in kept:
        table.table.keep(session.id)
    # Replies are not asked for again, and what is kept counts as room: a step would evict it.
    assert [session.kept for session in (*kept, live)] == [0, 0, 0, 50]
    assert table.table.room(table.free()) == 7
    asking = table.open("b", 200)
    asking.admit(0)
    # Those of the member that keeps most, the least recently used one first; then others; and then none.
    assert table.table.victims(asking, 200) == [kept[1]]
    table.table.touch(kept[1].id)
    assert table.table.victims(asking, 200) == [kept[2]]
    for session in (kept[2], kept[0], kept[1]):
        assert table.table.victims(asking, 200) == [session]
        table.table.evict(session)
    assert not table.table.victims(asking, 200)
    assert table.members() == "bh"


def test_how_many_are_kept_for_copies() -> None:
    table = Table(memory=1000, kept_tokens=300, max_sessions=3)
    sessions = [table.open("a", 200) for _ in range(3)]
    for session in sessions:
        session.admit(0)
        table.table.answered(session, answer(0, 1))
        table.table.keep(session.id)
    assert table.table.kept_sessions == 1
    for member in "bcd":
        table.open(member).admit(0)
    with pytest.raises(Busy):
        table.open("e")
    assert table.members() == "bcd"


def test_a_session_is_idle_only_if_nothing_of_it_waits() -> None:
    table = Table(max_sessions=1)
    session = table.open("a")
    assert session.admit(0)
    session.used -= table.table.limits.evict_after + 1
    with pytest.raises(Busy):
        table.open("a")
    table.table.answered(session, answer(0, 1))
    with pytest.raises(Busy):
        table.open("a")
    session.used -= table.table.limits.evict_after + 1
    table.open("a")
    assert table.table.get(session.id) is None


def test_a_request_that_has_come_before_does_not_keep_a_session_from_being_idle() -> None:
    table = Table()
    session = table.open("a")
    assert session.admit(0)
    table.table.answered(session, answer(0, 1))
    session.used = 1.0
    assert not session.admit(0)
    assert session.used == 1.0


# --- the queue and replies ---------------------------------------------------------------------------------


def test_the_queue_is_full_for_the_member_that_fills_it() -> None:
    table = Table(max_queued_bytes=100_000)
    body: Any = SimpleNamespace(store=None, divisible=False, first_turn=1.0)
    loop = ComputeLoop(body, table.table, threading.RLock(), lambda *_: None, lambda: None)
    size = 10_000

    def put(session: Session[Any]) -> None:
        header = headers.Relay(bytes(8), bytes(8), headers.RelayKind.REQUEST, 1)
        loop.put(
            PendingRequest(session, header, payloads.Close(), memoryview(bytes(size)), size, time.perf_counter())
        )

    hog, honest = table.open("h"), table.open("a")
    while not loop.is_full("h", size):
        put(hog)
    assert 100_000 - size - REQUEST_BYTES < loop.queued_bytes <= 100_000
    assert not loop.is_full("a", size)
    while not loop.is_full("a", size):
        put(honest)
    assert loop.is_full("h", 0)
    assert not loop.is_full("b", size)
    assert loop.queued_bytes <= 150_000


def test_replies_of_the_member_that_has_most_give_way() -> None:
    table = Table(max_replies=1000)
    honest = table.open("a")
    hogs = [table.open("h") for _ in range(3)]
    table.table.answered(honest, answer(0, 300))
    for hog in hogs:
        table.table.answered(hog, answer(0, 400))
    assert [len(each.replies) for each in (honest, *hogs)] == [1, 0, 0, 1]
    table.table.forget(honest, 1)
    table.table.close(hogs[2].id)
    assert table.table._kept.total == 0
    # An answer to a session that was closed meanwhile is not kept.
    table.table.answered(hogs[2], answer(1, 400))
    assert table.table._kept.total == 0


def test_a_reply_is_repeated_once_a_second_and_no_more_than_the_members_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(repeats_module, "time", clock)
    monkeypatch.setattr("split_common.trust.shares.time", clock)
    table, limits = Table(), WorkerLimits(repeat_rate=100, repeat_burst=200)
    repeats = Repeats(limits)
    session, other = table.open("h"), table.open("h")
    frames = answer(0, 100)
    table.table.answered(session, frames)
    assert [repeats.allow(session, frames) for _ in range(3)] == [True, False, False]
    assert repeats.allow(other, answer(0, 100))
    now += 1.0
    assert repeats.allow(session, frames)
    assert not repeats.allow(other, answer(0, 100))
    assert repeats.allow(table.open("a"), answer(0, 100))
    # What the device has acknowledged needs no further thought.
    table.table.forget(session, 1)
    assert not session.repeated


def test_each_member_has_a_bucket_of_its_own() -> None:
    strays = TokenBuckets(rate=0.0, burst=3.0)
    assert [strays.take("h") for _ in range(5)] == [True] * 3 + [False] * 2
    assert strays.take("a")
    strays.keep({"a"})
    assert strays.take("h")
    assert not strays.take("a", 2.5)
