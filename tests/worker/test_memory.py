"""Whatever a device sends, and in whatever order: once its sessions are closed, all KV memory is free again."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from split_common.engine import scheduler
from split_common.engine.forward import Forward
from split_common.engine.per_sequence import CachedSequence, CacheStore
from split_common.engine.pool import LayerShape, PagePool
from split_common.engine.sequences import TokenRun
from split_common.errors import Busy, OutOfOrder
from split_common.models.split import Split
from split_common.protocol import headers, payloads
from split_worker.bodies import language
from split_worker.bodies.language import LanguageBody
from split_worker.compute import ComputeLoop
from split_worker.limits import WorkerLimits
from split_worker.requests import PendingRequest
from split_worker.sessions import SessionTable

WIDTH = 4


class Layers:
    """Layers that compute nothing, but take the memory that real ones take (a `Runner`)."""

    device, dtype, width, max_positions = torch.device("cpu"), torch.float32, WIDTH, 10_000
    asynchronous = positions_interact = padding_matters = indivisible = takes_trees = False
    divisible = True
    layers = SimpleNamespace(stack=SimpleNamespace(position_axes=1, has_spans=False))

    def __init__(self, store: Any) -> None:
        self.store = store

    def launch(self, runs: Sequence[TokenRun[Any]]) -> Forward:
        for run in runs:
            if isinstance(run.sequence, CachedSequence):
                states = torch.zeros(1, 1, run.cost, 2)
                for layer in range(2, 4):
                    run.sequence.cache.update(states, states, layer)
                run.sequence.extended(run.cost)
            else:
                run.sequence.append(run.cost)
        return Forward(torch.cat([run.states for run in runs]), [run.cost for run in runs])


class Driver:
    """A compute loop, and sessions of some devices whose requests reach it."""

    def __init__(self, store: Any) -> None:
        self.body = LanguageBody(Layers(store), 0)  # type: ignore[arg-type]
        self.table = SessionTable(WorkerLimits(growth=1), store)
        self.refused: list[str] = []
        self.loop = ComputeLoop(self.body, self.table, threading.RLock(), self.answer, lambda: None)
        self.seqs: dict[int, int] = {}

    def answer(self, request: PendingRequest, reply: payloads.Payload, _: Any) -> None:
        if isinstance(reply, payloads.Refusal):
            self.refused.append(reply.reason)
        self.table.answered(request.session, (request.header, b"reply"))

    def send(self, number: int, payload: payloads.AnyRequest) -> None:
        """Takes a request of a session, which it opens if there is none: its requests then begin at 0."""
        id_ = (b"device%02d" % (number % 3), 1, number, 0)
        session = self.table.get(id_)
        if session is None:
            channel: Any = SimpleNamespace(
                epoch_keys=lambda *_: None, peer=SimpleNamespace(name=f"device-{number % 3}")
            )
            try:
                session = self.table.open(
                    id_, channel, self.body.new_state(channel.peer.name), self.body.store.free_tokens
                )
            except Busy:
                return
            self.seqs[number] = 0
        header = headers.Relay(b"worker00", id_[0], headers.RelayKind.REQUEST, 1, number, 0, self.seqs[number])
        try:
            session.admit(header.seq)
        except OutOfOrder:
            return
        self.seqs[number] += 1
        data = memoryview(bytes(payload.tensor_bytes))
        self.loop.put(PendingRequest(session, header, payload, data, len(data), time.perf_counter()))

    def session(self, number: int) -> Any:
        return self.table.get((b"device%02d" % (number % 3), 1, number, 0))

    def held(self, number: int) -> int:
        """Tokens that a session holds."""
        return int(self.body.store.held_by(self.session(number).state.sequences))

    def close(self, number: int) -> None:
        self.table.close((b"device%02d" % (number % 3), 1, number, 0))

    def turn(self) -> None:
        self.loop.wake()
        self.loop.turn(None)


def steps() -> st.SearchStrategy[payloads.Step]:
    runs = st.builds(
        lambda row, start, tokens: payloads.Run(row, start, list(range(start, start + tokens))),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 1, 16, 20]),
        st.sampled_from([1, 1, 5, 16, 40]),
    )
    selects = st.none() | st.lists(st.integers(0, 3), max_size=4)
    return st.builds(
        lambda rows, select: payloads.Step("float32", WIDTH, rows, select),
        st.lists(runs, max_size=4, unique_by=lambda run: run.row),
        selects,
    )


NUMBERS = st.integers(0, 4)
ACTS = st.lists(
    st.one_of(
        st.tuples(NUMBERS, steps()),
        st.tuples(NUMBERS, st.builds(payloads.Fork, NUMBERS, st.just(0))),
        st.tuples(NUMBERS, st.just("close")),
        st.tuples(NUMBERS, st.just("turn")),
    ),
    max_size=30,
)


def paged_store() -> PagePool:
    return PagePool({2: LayerShape(1, 1, 1)}, pages=24, dtype=torch.float32)


CONFIG = tiny.build("llama").config


def cache_store() -> CacheStore:
    return CacheStore(CONFIG, Split(6, 2, 4), capacity=300)


@pytest.mark.parametrize("store", [paged_store, cache_store])
@given(acts=ACTS)
@settings(max_examples=150, deadline=None)
def test_all_memory_comes_back(store: Any, acts: list[tuple[int, Any]]) -> None:
    driver = Driver(store())
    before = driver.body.store.free
    for number, act in acts:
        if act == "close":
            driver.close(number)
        elif act == "turn":
            driver.turn()
        else:
            driver.send(number, act)
    while not driver.loop._scheduler.idle or not driver.loop._inbox.empty():
        driver.turn()
    for number in range(5):
        driver.close(number)
    driver.turn()
    assert driver.body.store.free == before
    assert driver.loop.queued_bytes == driver.body._further.total == 0


def test_steps_that_take_no_more_memory_do_not_keep_it_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "STARVED_AFTER", 0.0)
    driver = Driver(paged_store())
    page, pages = 16, 24
    # Two sessions of one device hold all pages.
    for number in (0, 3):
        driver.send(number, payloads.Step("float32", WIDTH, [payloads.Run(0, 0, list(range(page * pages // 2)))]))
    while not driver.loop._scheduler.idle or not driver.loop._inbox.empty():
        driver.turn()
    assert driver.body.store.free == 0
    driver.send(1, payloads.Step("float32", WIDTH, [payloads.Run(0, 0, [0])]))
    # They write their last tokens again and again, so that there is always a step for which there is memory.
    for _ in range(10):
        for number in (0, 3):
            last = page * pages // 2 - 1
            driver.send(number, payloads.Step("float32", WIDTH, [payloads.Run(0, last, [last])]))
        driver.turn()
        if not driver.loop._scheduler.busy_sessions() - {driver.session(number) for number in (0, 3)}:
            break
    assert driver.held(1)
    assert [driver.session(number) is None for number in (0, 3)].count(True) == 1
    assert driver.loop.counters["evictions"] == 1


def test_steps_without_a_forward_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(paged_store())
    driver.send(0, payloads.Step("float32", WIDTH, [payloads.Run(0, 0, [0])]))
    driver.turn()
    assert driver.loop._delay._away
    driver.send(0, payloads.Step("float32", WIDTH, []))
    driver.turn()
    assert not driver.loop._delay._away
    # Nor is anybody waited for without end.
    monkeypatch.setattr(driver.loop._delay, "until", lambda _, now: now + 60.0)
    driver.loop._scheduler.budget.base = 0.001
    began = time.perf_counter()
    driver.send(1, payloads.Step("float32", WIDTH, [payloads.Run(0, 0, [0])]))
    driver.turn()
    assert time.perf_counter() - began < 30.0
    assert driver.held(1)


@pytest.mark.parametrize("store", [paged_store, cache_store])
def test_only_the_first_request_of_a_session_makes_it_a_copy(store: Any) -> None:
    driver = Driver(store())
    row = payloads.Step("float32", WIDTH, [payloads.Run(0, 0, list(range(5)))])
    for number, payload in ((0, row), (3, payloads.Fork(0, 0)), (3, payloads.Fork(0, 0)), (0, payloads.Fork(3, 0))):
        driver.send(number, payload)
        driver.turn()
    assert driver.refused == ["malformed", "malformed"]


def prompt(tokens: int) -> payloads.Step:
    return payloads.Step("float32", WIDTH, [payloads.Run(0, 0, list(range(tokens)))])


@pytest.mark.parametrize("store", [paged_store, cache_store])
def test_rows_beyond_one_for_each_session_are_shared_by_member(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "FURTHER_ROWS", 12)
    driver = Driver(store())

    def answered(number: int, payload: payloads.AnyRequest) -> bool:
        driver.refused.clear()
        driver.send(number, payload)
        driver.turn()
        assert driver.refused in ([], ["busy"])
        return not driver.refused

    def select(rows: list[int]) -> payloads.Step:
        return payloads.Step("float32", WIDTH, [payloads.Run(0, 4, [4])], rows)

    def beams(start: int, rows: list[int]) -> payloads.Step:
        runs = [payloads.Run(row, start, [start]) for row in range(len(rows))]
        return payloads.Step("float32", WIDTH, runs, rows)

    assert answered(0, prompt(5))
    assert answered(0, select([0] * 9))
    # Copies of a session have as many rows as it has.
    assert not answered(3, payloads.Fork(0, 0))
    assert not answered(0, select([0] * 14))
    for number in (1, 2):
        assert answered(number, prompt(5))
        assert answered(number, beams(5, [0] * 5))
        assert answered(number, beams(6, [0, 0, 1, 1, 2]))
    # Who has more than its share keeps what it has.
    assert not answered(0, select([0] * 10))
    assert answered(0, select([8] * 9))
    assert answered(0, select([0]))
    assert answered(6, payloads.Fork(0, 0))
    assert driver.body._further.total == 8


def test_what_kept_sessions_hold_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(paged_store())
    counted: list[int] = []
    freed_by = driver.body.store.freed_by
    monkeypatch.setattr(driver.body.store, "freed_by", lambda rows: counted.append(len(rows)) or freed_by(rows))
    driver.send(0, prompt(20))
    driver.turn()
    for number in (3, 6, 9):
        driver.send(number, payloads.Fork(0, 0))
        driver.turn()
        driver.table.keep(driver.session(number).id)
    assert driver.table._kept_tokens() == 0
    driver.table.keep(driver.session(0).id)
    counted.clear()
    assert driver.table._kept_tokens() == 32
    assert counted == [4]


def test_sessions_give_way_whose_memory_is_free_then() -> None:
    driver = Driver(paged_store())
    page = 16
    for number, payload in (
        (0, prompt(14 * page)),
        (3, prompt(6 * page)),
        *((number, payloads.Fork(0, 0)) for number in (6, 9, 12)),
        (1, prompt(8 * page)),
    ):
        driver.send(number, payload)
        driver.turn()
    # The newer ones are copies, whose pages others have.
    assert driver.held(1) == 8 * page
    assert [number for number in (0, 3, 6, 9, 12) if driver.session(number) is None] == [3]
    driver.send(2, prompt(10 * page))
    driver.turn()
    assert driver.held(2) == 10 * page
    assert [number for number in (0, 1, 6, 9, 12) if driver.session(number) is None] == [0, 6, 9, 12]
    assert driver.loop.counters["evictions"] == 5
