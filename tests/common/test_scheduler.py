"""The scheduler: decoding first, prefill in chunks that fit, devices in turns."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from split_common.engine.forward_times import MAX_CHUNK, MIN_CHUNK, WAIT_AHEAD, BatchDelay, ChunkBudget
from split_common.engine.scheduler import MAX_ROWS, SLOW_FORWARD, STARVED_AFTER, Scheduler, is_prefill
from split_common.engine.sequences import TokenRun
from split_common.engine.steps import ScheduledChunk, ScheduledStep
from split_common.engine.turns import MAX_TOGETHER, MAX_WEIGHT, PREFILL_BURST, PrefillShares


@pytest.fixture(autouse=True)
def _frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, sessions go on decoding."""
    for module in ("scheduler", "forward_times"):
        monkeypatch.setattr(f"split_common.engine.{module}.time", SimpleNamespace(monotonic=lambda: 100.0))


class FakeSequence:
    length = 0

    def cost(self, tokens: int) -> int:
        return tokens


class FakeStore:
    capacity = free = free_tokens = 10_000


Runs = Sequence[TokenRun[Any]]
Step = ScheduledStep[Runs, TokenRun[Any]]
Chunk = ScheduledChunk[Runs, TokenRun[Any]]


def make_step(session: str, tokens: int, member: str = "") -> Step:
    run = TokenRun[Any](FakeSequence(), torch.arange(tokens)[:, None], range(tokens))
    return ScheduledStep(session, member or session, is_prefill(tokens), [run])


class Bench:
    """A scheduler, and a caller that does what it is told."""

    def __init__(self, store: Any = None, *, divisible: bool = True) -> None:
        self.scheduler = Scheduler[Runs, TokenRun[Any]](store or FakeStore(), divisible=divisible)
        #: Outputs by session, in the order in which steps were over; None for one that was refused.
        self.outputs: list[tuple[Any, torch.Tensor | None]] = []

    def add(self, step: Step) -> None:
        self.start(self.scheduler.add(step))

    def start(self, step: Step | None) -> None:
        if step is not None:
            self.scheduler.start(step, step.request)

    def end(self, step: Step, output: torch.Tensor | None) -> None:
        self.outputs.append((step.session, output))
        self.start(self.scheduler.end(step))

    def next_batch(self) -> list[Chunk]:
        while True:
            batch, starved = self.scheduler.next_batch()
            if starved is None:
                return batch
            self.end(starved, None)

    def finish(self, batch: list[Chunk], seconds: float = 0.01) -> None:
        for step in self.scheduler.finish(batch, [chunk.run.states for chunk in batch], seconds):
            self.end(step, step.output())

    def forward(self, seconds: float = 0.01) -> dict[Any, int]:
        batch = self.next_batch()
        self.finish(batch, seconds)
        return sizes(batch)

    def run_all(self) -> list[dict[Any, int]]:
        batches = []
        while batch := self.next_batch():
            batches.append(sizes(batch))
            self.finish(batch)
        return batches


def sizes(batch: Sequence[Chunk]) -> dict[Any, int]:
    return {chunk.step.session: chunk.run.cost for chunk in batch}


def test_decoding_goes_first_and_prefill_is_cut() -> None:
    bench = Bench()
    bench.add(make_step("prefill", MAX_CHUNK + 100))
    bench.add(make_step("one", 1))
    batches = bench.run_all()
    assert batches[0] == {"one": 1, "prefill": MAX_CHUNK}
    assert all(batch["prefill"] <= MAX_CHUNK for batch in batches)
    assert sum(batch["prefill"] for batch in batches) == MAX_CHUNK + 100
    (output,) = (output for session, output in bench.outputs if session == "prefill")
    assert output is not None
    assert output.flatten().tolist() == list(range(MAX_CHUNK + 100))


def test_devices_take_turns_with_their_prefills() -> None:
    bench = Bench()
    for number in range(3):
        bench.add(make_step(f"greedy {number}", 2 * MAX_CHUNK, member="greedy"))
    bench.add(make_step("modest", MAX_CHUNK, member="modest"))
    batches = bench.run_all()
    assert any("modest" in batch for batch in batches[:2])


def test_prefill_of_a_device_that_does_not_decode_goes_first_where_forwards_are_slow() -> None:
    bench = Bench()
    bench.add(make_step("busy 1", 1, member="busy"))
    assert bench.forward(2 * SLOW_FORWARD) == {"busy 1": 1}
    assert not bench.scheduler.has_urgent_prefill
    bench.add(make_step("busy 1", 1, member="busy"))
    bench.add(make_step("busy 2", MIN_CHUNK + 1, member="busy"))
    bench.add(make_step("new", MIN_CHUNK + 1))
    assert bench.scheduler.has_urgent_prefill
    assert bench.forward(0.1) == {"new": MIN_CHUNK}
    # Then it is the others' turn, though there is urgent prefill left.
    assert bench.forward(0.1) == {"busy 1": 1, "busy 2": MIN_CHUNK}
    assert bench.forward(0.1) == {"new": 1}
    assert bench.forward(0.1) == {"busy 2": 1}


def test_urgent_prefill_that_does_not_fit_leaves_the_others_their_turn() -> None:
    store = FakeStore()
    bench = Bench(store)
    bench.add(make_step("busy 1", 1, member="busy"))
    bench.forward(2 * SLOW_FORWARD)
    store.free = 0
    bench.add(make_step("busy 1", 1, member="busy"))
    bench.add(make_step("new", MIN_CHUNK + 1))
    batch, starved = bench.scheduler.next_batch()
    assert batch == []
    assert starved is not None
    assert starved.session == "busy 1"
    # The caller has made room for it.
    store.free = 1000
    assert bench.forward(0.1) == {"busy 1": 1, "new": MIN_CHUNK}


def test_a_step_without_memory_is_overdue_though_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr("split_common.engine.scheduler.time", clock)
    store = FakeStore()
    bench = Bench(store)
    scheduler = bench.scheduler

    def forward_at(now: float) -> list[Any]:
        clock.monotonic = lambda: now
        bench.add(make_step("hog", 1))
        return list(bench.forward())

    store.free = 1
    bench.add(make_step("starved", 2))
    assert forward_at(100.0) == ["hog"]
    assert scheduler.overdue() is None
    assert forward_at(100.1 + STARVED_AFTER) == ["hog"]
    overdue = scheduler.overdue()
    assert overdue is not None
    assert overdue.session == "starved"
    # Nothing could be freed for it.
    scheduler.wait_on(overdue)
    assert scheduler.overdue() is None
    assert forward_at(100.3 + 2 * STARVED_AFTER) == ["hog"]
    assert scheduler.overdue() is overdue
    store.free = 3
    assert scheduler.overdue() is None
    assert sorted(forward_at(100.3 + 2 * STARVED_AFTER)) == ["hog", "starved"]


def test_members_with_very_many_tokens_take_turns_in_decoding() -> None:
    bench = Bench()
    for number in range(100):
        bench.add(make_step(f"greedy {number}", 16, member="greedy"))
    assert len(bench.next_batch()) == 100
    bench = Bench()
    for number in range(100):
        bench.add(make_step(f"greedy {number}", 16, member="greedy"))
    bench.add(make_step("modest", 1, member="modest"))
    bench.add(make_step("another", 1, member="another"))
    batches = bench.run_all()
    assert {"modest", "another"} <= set(batches[0])
    assert all(sum(batch.values()) <= MAX_CHUNK for batch in batches)
    assert sum(sum(batch.values()) for batch in batches) == 100 * 16 + 2


def test_a_prompt_that_cannot_be_divided_uses_up_what_prefill_may_have() -> None:
    bench = Bench(divisible=False)
    for number in range(3):
        bench.add(make_step(f"greedy {number}", MAX_CHUNK, member="greedy"))
    bench.add(make_step("one", 1))
    assert [len(batch) for batch in bench.run_all()] == [2, 1, 1]


def test_prefill_of_a_device_that_does_not_decode_joins_where_forwards_are_fast() -> None:
    bench = Bench()
    bench.add(make_step("busy", 1))
    bench.forward(SLOW_FORWARD / 2)
    bench.add(make_step("busy", 1))
    bench.add(make_step("new", MIN_CHUNK + 1))
    assert set(sizes(bench.next_batch())) == {"busy", "new"}


def test_a_sessions_steps_run_one_after_the_other() -> None:
    bench = Bench()
    for number in range(3):
        run = TokenRun[Any](FakeSequence(), torch.full((1, 1), number), [number])
        assert not bench.scheduler.has_more("session") or number == 2
        bench.add(ScheduledStep("session", "device", False, [run]))
    assert bench.scheduler.has_more("session")
    assert bench.run_all() == [{"session": 1}] * 3
    assert not bench.scheduler.has_more("session")
    assert [int(output) for _, output in bench.outputs if output is not None] == [0, 1, 2]


def test_an_indivisible_prefill_goes_through_whole() -> None:
    bench = Bench(divisible=False)
    bench.add(make_step("long", 3 * MAX_CHUNK))
    assert bench.run_all() == [{"long": 3 * MAX_CHUNK}]


def test_what_does_not_fit_is_told_to_the_caller_and_the_next_goes_on() -> None:
    store = FakeStore()
    store.free = 10
    bench = Bench(store)
    bench.add(make_step("large", 12))
    bench.add(make_step("small", 3))
    assert bench.run_all() == [{"small": 3}]
    assert [session for session, output in bench.outputs if output is None] == ["large"]
    assert bench.scheduler.idle


def test_a_step_that_ends_before_it_starts_leaves_the_next_one_running() -> None:
    bench = Bench()
    refused, following = make_step("a", 1), make_step("a", 2)
    assert bench.scheduler.add(refused) is refused
    assert bench.scheduler.add(following) is None
    bench.add(make_step("b", 3))
    bench.end(refused, None)
    assert bench.run_all() == [{"a": 2, "b": 3}]


def test_a_step_without_runs_is_complete() -> None:
    bench = Bench()
    step = make_step("a", 1)
    assert bench.scheduler.add(step) is step
    bench.scheduler.start(step, [])
    assert step.complete
    assert step.output().numel() == 0
    assert bench.scheduler.end(step) is None
    assert bench.scheduler.idle


def test_a_cancelled_sessions_steps_are_handed_back() -> None:
    bench = Bench()
    steps = [make_step("a", 2), make_step("a", 1)]
    for step in steps:
        bench.add(step)
    assert bench.scheduler.cancel("a") == steps
    assert bench.next_batch() == []
    assert bench.scheduler.cancel("a") == []


def test_a_session_has_one_forward_under_way_and_may_be_cancelled_meanwhile() -> None:
    bench = Bench()
    bench.add(make_step("a", 1))
    bench.add(make_step("b", MAX_CHUNK + 1))
    under_way = bench.next_batch()
    assert sizes(under_way) == {"a": 1, "b": MAX_CHUNK}
    bench.add(make_step("c", 1))
    assert sizes(bench.next_batch()) == {"c": 1}
    bench.scheduler.cancel("a")
    bench.finish(under_way)
    assert bench.outputs == []
    assert sizes(bench.next_batch()) == {"b": 1}


def test_a_forward_waits_for_sessions_that_come_back_soon_and_for_no_others() -> None:
    delay, forward = BatchDelay(), 0.1
    for session, turnaround in (("quick", 0.02), ("later", 0.3), ("slow", 2.0)):
        delay.answered(session, 10.0)
        delay.returned(session, 10.0 + turnaround)
    assert delay.until(forward, 13.0) == 0.0
    for session in ("unknown", "slow", "later", "quick"):
        delay.answered(session, 20.0)
    # One is expected within the time of a forward, and has as long beyond it.
    assert delay.until(forward, 20.0) == pytest.approx(20.02 + WAIT_AHEAD * forward)
    delay.returned("quick", 20.02)
    assert delay.until(forward, 20.02) == 0.0
    # By now the next one is.
    assert delay.until(forward, 20.25) == pytest.approx(20.3 + WAIT_AHEAD * forward)
    delay.forget("later")
    assert delay.until(forward, 20.25) == 0.0
    # The slow one never is: too many forwards have run meanwhile.
    assert delay.until(forward, 22.0) == 0.0


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


# --- steps that take no memory: images ---------------------------------------------------------------------


class FakeRun:
    """A step of an image: it goes into a forward whole."""

    def __init__(self, cost: int) -> None:
        self.cost = cost

    def memory(self, count: int) -> int:
        return 0


class ImageBench:
    """A scheduler of steps that wait for their turn, and a caller that starts them when it comes."""

    def __init__(self) -> None:
        self.scheduler = Scheduler[Any, Any](None, divisible=False)
        self.numbers = itertools.count()

    def add(self, member: str, cost: int, count: int = 1) -> None:
        for _ in range(count):
            step = ScheduledStep[Any, Any](f"{member} {next(self.numbers)}", member, False, None, cost)
            assert self.scheduler.add(step) is None

    def turn(self) -> list[str]:
        """The members whose steps ran in the next turn."""
        for step in self.scheduler.due():
            self.scheduler.start(step, [FakeRun(int(step.weight))])
        batch, starved = self.scheduler.next_batch()
        assert starved is None
        for step in self.scheduler.finish(batch, [torch.empty(1)] * len(batch), 0.01):
            self.scheduler.end(step)
        return sorted(str(chunk.step.member) for chunk in batch)


def test_a_member_alone_gets_all_it_asks_for_a_few_at_a_time() -> None:
    bench = ImageBench()
    bench.add("a", 10, count=MAX_TOGETHER + 3)
    assert [len(bench.turn()) for _ in range(3)] == [MAX_TOGETHER, 3, 0]


def test_steps_that_take_much_memory_begin_one_at_a_time() -> None:
    bench = ImageBench()
    bench.add("a", MAX_WEIGHT - 1, count=3)
    assert [len(bench.turn()) for _ in range(3)] == [1, 1, 1]


def test_one_step_of_each_member_a_turn_however_many_it_has() -> None:
    bench = ImageBench()
    bench.add("hog", 10, count=100)
    bench.add("b", 10)
    bench.add("c", 10)
    assert bench.turn() == ["b", "c", "hog"]
    for _ in range(5):
        bench.add("b", 10)
        assert bench.turn() == ["b", "hog"]


def test_a_costly_step_waits_until_others_had_as_much() -> None:
    bench = ImageBench()
    bench.add("hog", 100, count=5)
    bench.add("b", 10)
    assert bench.turn() == ["b", "hog"]
    ran: Counter[str] = Counter()
    for _ in range(33):
        bench.add("b", 10)
        ran.update(bench.turn())
    assert ran == {"b": 33, "hog": 3}


def test_decoding_steps_take_turns_where_they_do_not_all_fit() -> None:
    bench = Bench()
    for number in range(MAX_ROWS + 50):
        bench.add(make_step(f"hog {number}", 1, member="hog"))
    bench.add(make_step("modest", 1))
    batch = bench.next_batch()
    assert len(batch) == MAX_ROWS
    assert "modest" in {chunk.step.session for chunk in batch}


def prefill_beside_decoding(seconds: float) -> tuple[Bench, list[Chunk]]:
    """A scheduler after a forward with a chunk of one member's prefill, and the next batch beside others' steps."""
    bench = Bench()
    bench.add(make_step("decoding", 1))
    bench.finish(bench.next_batch(), 0.01)
    bench.add(make_step("long", 400))
    bench.add(make_step("decoding", 1))
    bench.finish(bench.next_batch(), seconds)
    bench.add(make_step("decoding", 1))
    return bench, bench.next_batch()


def test_prefill_within_its_share_goes_beside_decoding() -> None:
    _, batch = prefill_beside_decoding(PREFILL_BURST)
    assert [chunk.step.session for chunk in batch] == ["decoding", "long"]


def test_prefill_beyond_its_share_takes_what_the_others_leave() -> None:
    bench, batch = prefill_beside_decoding(PREFILL_BURST * 3)
    assert [chunk.step.session for chunk in batch] == ["decoding"]
    bench.finish(batch, 0.01)
    # Another member's first prompt does not wait for it, and it does not wait longer than that.
    bench.add(make_step("new", 20))
    assert [chunk.step.session for chunk in bench.next_batch()] == ["new"]
    assert [chunk.step.session for chunk in bench.next_batch()] == ["long"]


def test_prefill_of_a_member_alone_has_no_share() -> None:
    bench = Bench()
    for _ in range(3):
        bench.add(make_step("a session", 1, "alone"))
        bench.add(make_step("another", 2000, "alone"))
        bench.finish(bench.next_batch(), PREFILL_BURST * 2)
        bench.add(make_step("a session", 1, "alone"))
        assert {chunk.step.session for chunk in bench.next_batch()} == {"a session", "another"}
        for session in ("a session", "another"):
            bench.scheduler.cancel(session)


def test_a_debt_of_prefill_is_paid_by_time() -> None:
    """Short forwards are forgiven beyond a limit, because others do not wait for them long."""
    shares = PrefillShares()
    for second in range(100):
        shares.charge({"a": 1.0}, 4, second, second + 1)
    assert shares.over(4, 100.0).keys() == {"a"}
    assert shares.over(4, 100.0 + 4 * PREFILL_BURST - 0.1).keys() == {"a"}
    assert not shares.over(4, 100.0 + 4 * PREFILL_BURST + 0.1)


def test_a_long_prefill_is_owed_to_the_end() -> None:
    shares = PrefillShares()
    shares.charge({"a": 40.0}, 2, 0.0, 40.0)
    # Neither a short one after it, nor a long one of another member, changes that.
    shares.charge({"a": 0.1, "b": 30.0}, 2, 40.0, 40.1)
    assert shares.over(2, 40.1)["a"] == pytest.approx(20.0, abs=0.1)
    paid = 2 * (40.0 - PREFILL_BURST)
    assert shares.over(2, paid - 0.2).keys() == {"a", "b"}
    assert shares.over(2, paid + 0.2).keys() == {"b"}


def test_a_member_alone_owes_nothing_afterwards() -> None:
    shares = PrefillShares()
    for start in (0.0, 40.0):
        shares.charge({"a": 40.0}, 1, start, start + 40.0)
    assert not shares.over(2, 80.0)


class Shared:
    """A worker whose layers take a prompt whole, and members who send a step some time after their last answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in ("scheduler", "forward_times"):
            clock = SimpleNamespace(monotonic=lambda: self.now)
            monkeypatch.setattr(f"split_common.engine.{module}.time", clock)
        store: Any = SimpleNamespace(free=10**9)
        self.scheduler = Scheduler[Runs, TokenRun[Any]](store, divisible=False, holding=True)
        #: When each member sends its next step, its tokens, and seconds from an answer to the step after it.
        self.due: dict[str, tuple[float, int, float]] = {}
        #: Seconds of forwards in which each member had a step, by the kind of the step.
        self.spent = Counter[str]()

    def run(self, seconds: float, token: float = 0.001) -> None:
        """Lets time pass, in which a token of prefill takes so long, and a forward 10 ms at least."""
        end = self.now + seconds
        while self.now < end:
            for member, (when, tokens, _) in self.due.items():
                if when <= self.now:
                    self.due[member] = (float("inf"), tokens, self.due[member][2])
                    step = make_step(member, tokens)
                    assert self.scheduler.add(step) is step
                    self.scheduler.start(step, step.request)
            batch, starved = self.scheduler.next_batch()
            assert starved is None
            if not batch:
                assert bool(self.scheduler.holds) != self.scheduler.idle
                self.now += self.scheduler.holds or 0.005
                continue
            took = 0.01 + token * sum(chunk.run.cost for chunk in batch if chunk.step.prefill)
            self.now += took
            for step in self.scheduler.finish(batch, [chunk.run.states for chunk in batch], took):
                self.scheduler.end(step)
                self.spent[str(step.member)] += took
                _, tokens, away = self.due[str(step.member)]
                self.due[str(step.member)] = self.now + away, tokens, away


def test_prompts_that_cannot_be_divided_leave_others_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the others are away, at their devices, whenever a prompt could begin."""
    for away in (0.0, 0.05):
        shared = Shared(monkeypatch)
        shared.due = {"hog": (100.0, 20_000, 0.0), "honest": (100.0, 1, away)}
        shared.run(600)
        assert shared.spent["hog"] < 0.6 * 600
        # Its share is not taken from it either.
        assert shared.spent["hog"] > 0.4 * 600


def test_a_long_prompt_of_a_member_that_owes_nothing_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(monkeypatch)
    shared.due = {"honest": (100.0, 1, 0.05), "long": (101.0, 20_000, 1e9)}
    shared.run(25)
    assert shared.spent["long"] > 20


def test_prompts_of_a_member_alone_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(monkeypatch)
    shared.due = {"hog": (100.0, 20_000, 0.0), "honest": (700.0, 1, 0.05)}
    shared.run(600)
    assert shared.spent["hog"] > 0.99 * 600
    # What it had while nobody waited is not owed: its next prompt begins, too.
    shared.spent.clear()
    shared.run(25)
    assert shared.spent["hog"] > 20
