"""The scheduler: decoding first, prefill in chunks that fit, devices in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from split_common.engine.rows import Run
from split_common.engine.scheduler import (
    MAX_CHUNK,
    MIN_CHUNK,
    SLOW_FORWARD,
    SOON,
    ChunkBudget,
    Gathering,
    Job,
    Piece,
    Scheduler,
)
from split_common.errors import Busy


class FakeRow:
    length = 0


class FakeStore:
    capacity = free = free_tokens = 10_000

    def cost(self, _row: Any, tokens: int) -> int:
        return tokens


def make_job(session: str, tokens: int, device: str = "", outcomes: dict[str, Any] | None = None) -> Job:
    run = Run(FakeRow(), torch.arange(tokens)[:, None], range(tokens))  # type: ignore[arg-type]

    def finish(outcome: Any) -> None:
        if outcomes is not None:
            outcomes[session] = outcome

    return Job(session, device or session, tokens, lambda: [run], finish)


def sizes(batch: Sequence[Piece]) -> dict[Any, int]:
    return {piece.job.session: len(piece.run.positions) for piece in batch}


def run_all(scheduler: Scheduler) -> list[dict[Any, int]]:
    batches = []
    while batch := scheduler.next_batch():
        batches.append(sizes(batch))
        scheduler.finish(batch, [piece.run.states for piece in batch], 0.01)
    return batches


def test_decoding_goes_first_and_prefill_is_cut() -> None:
    outcomes: dict[str, Any] = {}
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    scheduler.add(make_job("prefill", MAX_CHUNK + 100, outcomes=outcomes))
    scheduler.add(make_job("one", 1, outcomes=outcomes))
    batches = run_all(scheduler)
    assert batches[0] == {"one": 1, "prefill": MAX_CHUNK}
    assert all(batch["prefill"] <= MAX_CHUNK for batch in batches)
    assert sum(batch["prefill"] for batch in batches) == MAX_CHUNK + 100
    assert outcomes["prefill"].flatten().tolist() == list(range(MAX_CHUNK + 100))


def test_devices_take_turns_with_their_prefills() -> None:
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    for number in range(3):
        scheduler.add(make_job(f"greedy {number}", 2 * MAX_CHUNK, device="greedy"))
    scheduler.add(make_job("modest", MAX_CHUNK, device="modest"))
    batches = run_all(scheduler)
    assert any("modest" in batch for batch in batches[:2])


def test_a_newcomer_goes_first_where_forwards_are_slow() -> None:
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]

    def forward(seconds: float) -> dict[Any, int]:
        batch = scheduler.next_batch()
        scheduler.finish(batch, [piece.run.states for piece in batch], seconds)
        return sizes(batch)

    scheduler.add(make_job("busy 1", 1, device="busy"))
    assert forward(2 * SLOW_FORWARD) == {"busy 1": 1}
    assert not scheduler.hurries
    scheduler.add(make_job("busy 1", 1, device="busy"))
    scheduler.add(make_job("busy 2", MIN_CHUNK + 1, device="busy"))
    scheduler.add(make_job("new", MIN_CHUNK + 1))
    assert scheduler.hurries
    assert forward(0.1) == {"new": MIN_CHUNK}
    # Then it is the others' turn, though there is a newcomer still.
    assert forward(0.1) == {"busy 1": 1, "busy 2": MIN_CHUNK}
    assert forward(0.1) == {"new": 1}
    assert forward(0.1) == {"busy 2": 1}


def test_a_newcomer_joins_where_forwards_are_fast() -> None:
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    scheduler.add(make_job("busy", 1))
    batch = scheduler.next_batch()
    scheduler.finish(batch, [piece.run.states for piece in batch], SLOW_FORWARD / 2)
    scheduler.add(make_job("busy", 1))
    scheduler.add(make_job("new", MIN_CHUNK + 1))
    assert set(sizes(scheduler.next_batch())) == {"busy", "new"}


def test_a_sessions_steps_run_one_after_the_other() -> None:
    order: list[int] = []
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    for number in range(3):
        run = Run(FakeRow(), torch.zeros(1, 1), [number])  # type: ignore[arg-type]
        scheduler.add(Job("session", "device", 1, lambda run=run: [run], lambda _, n=number: order.append(n)))  # type: ignore[misc]
    assert run_all(scheduler) == [{"session": 1}] * 3
    assert order == [0, 1, 2]


def test_an_indivisible_prefill_goes_through_whole() -> None:
    scheduler = Scheduler(FakeStore(), divisible=False)  # type: ignore[arg-type]
    scheduler.add(make_job("long", 3 * MAX_CHUNK))
    assert run_all(scheduler) == [{"long": 3 * MAX_CHUNK}]


def test_what_does_not_fit_is_told_to_come_back_and_the_next_goes_on() -> None:
    outcomes: dict[str, Any] = {}
    store = FakeStore()
    store.free = 10
    scheduler = Scheduler(store)  # type: ignore[arg-type]
    scheduler.add(make_job("large", 12, outcomes=outcomes))
    scheduler.add(make_job("small", 3, outcomes=outcomes))
    assert run_all(scheduler) == [{"small": 3}]
    assert isinstance(outcomes["large"], Busy)
    assert scheduler.idle


def test_a_step_that_is_refused_leaves_the_next_one_running() -> None:
    outcomes: dict[str, Any] = {}

    def refuse() -> list[Run]:
        raise ValueError("no")

    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    scheduler.add(Job("a", "d", 1, refuse, lambda outcome: outcomes.update(a=outcome)))
    scheduler.add(make_job("b", 2, outcomes=outcomes))
    assert run_all(scheduler) == [{"b": 2}]
    assert isinstance(outcomes["a"], ValueError)


def test_a_cancelled_session_ends_with_its_error() -> None:
    outcomes: dict[str, Any] = {}
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    scheduler.add(make_job("a", 2, outcomes=outcomes))
    scheduler.cancel("a", KeyError("gone"))
    assert isinstance(outcomes["a"], KeyError)
    assert scheduler.next_batch() == []


def test_a_session_has_one_forward_under_way_and_may_be_cancelled_meanwhile() -> None:
    outcomes: dict[str, Any] = {}
    scheduler = Scheduler(FakeStore())  # type: ignore[arg-type]
    scheduler.add(make_job("a", 1, outcomes=outcomes))
    scheduler.add(make_job("b", MAX_CHUNK + 1, outcomes=outcomes))
    under_way = scheduler.next_batch()
    assert sizes(under_way) == {"a": 1, "b": MAX_CHUNK}
    scheduler.add(make_job("c", 1, outcomes=outcomes))
    assert sizes(scheduler.next_batch()) == {"c": 1}
    scheduler.cancel("a", KeyError("gone"))
    scheduler.finish(under_way, [piece.run.states for piece in under_way], 0.01)
    assert isinstance(outcomes["a"], KeyError)
    assert sizes(scheduler.next_batch()) == {"b": 1}


def test_a_forward_waits_for_sessions_that_come_back_soon_and_for_no_others() -> None:
    gathering, forward = Gathering(), 0.1
    for session, turnaround in (("quick", 0.02), ("later", 0.3), ("slow", 2.0)):
        gathering.answered(session, 10.0)
        gathering.came(session, 10.0 + turnaround)
    assert gathering.until(forward, 13.0) == 0.0
    for session in ("unknown", "slow", "later", "quick"):
        gathering.answered(session, 20.0)
    # One is expected within the time of a forward, and has as long beyond it.
    assert gathering.until(forward, 20.0) == pytest.approx(20.02 + SOON * forward)
    gathering.came("quick", 20.02)
    assert gathering.until(forward, 20.02) == 0.0
    # By now the next one is.
    assert gathering.until(forward, 20.25) == pytest.approx(20.3 + SOON * forward)
    gathering.forget("later")
    assert gathering.until(forward, 20.25) == 0.0
    # The slow one never is: too many forwards have run meanwhile.
    assert gathering.until(forward, 22.0) == 0.0


def test_the_budget_is_small_beside_decoding_and_finds_its_size() -> None:
    """A token of prefill costs 1 ms, a decoding forward 100 ms: 100 tokens double it."""
    budget = ChunkBudget()
    assert budget.tokens() == MAX_CHUNK
    budget.observe(1, 0, 0.1)
    assert budget.tokens() == MIN_CHUNK
    for _ in range(40):
        chunk = budget.tokens()
        budget.observe(1, chunk, 0.1 + 0.001 * chunk)
    assert 90 <= budget.tokens() <= 100
    for _ in range(10):
        budget.observe(1, budget.tokens(), 0.1 + 0.01 * budget.tokens())
    assert budget.tokens() <= 16
