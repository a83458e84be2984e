"""Fail-over alone: no queue, no worker, and a clock that jumps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from split_common.errors import Busy, Malformed, NoWorker, SessionLost, StepFailed, WorkerGone, WorkerSlow
from split_common.protocol import headers
from split_device.sessions import dead_letters, resilient
from split_device.sessions.identity import SessionIdentity, SessionNames
from split_device.sessions.notices import LOOK, Notices
from split_device.sessions.resilient import ResilientSession
from split_device.sessions.tries import LEAST_DEATH, MAX_DEATHS, Blame

PATIENCE = 60.0

#: What becomes of a try to send: an error, or None for an answer.
Outcome = Exception | None


class Remote:
    """A session on worker number `worker`."""

    def __init__(self, worker: int, key: bytes = b"") -> None:
        self.worker = bytes([worker])
        self.channel = SimpleNamespace(worker_name=f"worker-{worker}")
        self.ref = key
        self.ended = self.interrupted = self.patient = self.is_copying = False
        self.say: Callable[[str], None] = lambda _: None

    def close(self) -> None:
        self.ended = True

    def interrupt(self) -> None:
        self.interrupted = True


class Client:
    """Opens sessions on one worker after the other, unless `refusals` says otherwise."""

    def __init__(self, *refusals: Exception) -> None:
        self.patience = PATIENCE
        self.served = True
        self.counters: Counter[str] = Counter()
        self.service = headers.Service(bytes(32), 2, 4)
        self.model = "tiny"
        self.command = "lambda-split worker --model tiny"
        self.unit = "layers"
        self.said: list[str] = []
        self.notices = Notices(self.said.append)
        self.refusals = list(refusals)
        self.opened: list[Remote] = []
        #: For each attempt to open a session: the workers to avoid, and the epoch.
        self.asked: list[tuple[list[bytes], int]] = []

    def waits_after(self, error: NoWorker) -> bool:
        return error.served == "none"

    def name_session(self, request_id: str | None = None, index: int = 0) -> SessionIdentity:
        return SessionNames().name(request_id or "req-1", index)

    def open_session(
        self, avoid: Any, identity: SessionIdentity, epoch: int, check: Callable[[], None], _never: Any
    ) -> Remote:
        check()
        self.asked.append((list(avoid), epoch))
        if self.refusals:
            raise self.refusals.pop(0)
        self.opened.append(Remote(len(self.opened) + 1, identity.key))
        return self.opened[-1]


class Work:
    """Steps that end as they are told, and replays that do."""

    def __init__(self, *sends: Outcome, replays: tuple[Outcome, ...] = (), is_new: bool = False) -> None:
        self.sends: Iterator[Outcome] = iter(sends)
        self.replays: Iterator[Outcome] = iter(replays)
        self.is_new = is_new
        self.log: list[tuple[str, int]] = []

    def replay(self, session: Any, _step: str) -> None:
        self.log.append(("replay", session.worker[0]))
        self._end(session, next(self.replays, None))

    def send(self, session: Any, step: str) -> list[Any]:
        self.log.append((step, session.worker[0]))
        self._end(session, next(self.sends))
        return [step]

    def is_spoilt(self, step: str) -> bool:
        return step == "spoilt"

    def describe(self, _step: str) -> tuple[int, int, int]:
        return 1, 2, 3

    @staticmethod
    def _end(session: Remote, outcome: Outcome) -> None:
        if outcome is not None:
            session.ended = isinstance(outcome, SessionLost)
            raise outcome


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    dead_letters.clear()
    clock = Clock()
    monkeypatch.setattr(resilient, "time", clock)
    return clock


def session_of(client: Client) -> ResilientSession:
    return ResilientSession(client)  # type: ignore[arg-type]


def test_a_lost_session_is_told_all_and_goes_on_elsewhere() -> None:
    client, work = Client(), Work(None, SessionLost("gone"), None)
    session = session_of(client)
    assert session.call(work, "one") == ["one"]
    assert session.call(work, "two") == ["two"]
    assert work.log == [("replay", 1), ("one", 1), ("two", 1), ("replay", 2), ("two", 2)]
    assert client.asked == [([], 0), ([bytes([1])], 1)]
    assert client.counters["replays"] == 2


def test_a_replay_that_fails_is_not_gone_on_with() -> None:
    client, work = Client(), Work(None, replays=(Busy("full", 0.5), None))
    assert session_of(client).call(work, "one") == ["one"]
    assert work.log == [("replay", 1), ("replay", 2), ("one", 2)]
    assert client.opened[0].ended
    assert client.counters["replays"] == 1


def test_where_none_but_the_avoided_worker_has_room_it_is_taken() -> None:
    client = Client()
    session = session_of(client)
    work = Work(None, SessionLost("gone"), None)
    session.call(work, "one")
    client.refusals = [Busy("full", 0.5)]
    session.call(work, "two")
    assert [avoid for avoid, _ in client.asked] == [[], [bytes([1])], []]


@pytest.mark.parametrize(("step", "workers"), [("whole", [1, 1]), ("spoilt", [1, 2])])
def test_a_worker_that_is_full_is_asked_again_unless_part_of_the_step_may_have_run(
    step: str, workers: list[int]
) -> None:
    work = Work(Busy("full", 0.5), None)
    session_of(Client()).call(work, step)
    assert [worker for what, worker in work.log if what == step] == workers


def test_after_a_refusal_the_session_begins_again() -> None:
    client, work = Client(), Work(Malformed("no"), None)
    session = session_of(client)
    with pytest.raises(Malformed):
        session.call(work, "one")
    assert client.opened[0].ended
    assert session.call(work, "one") == ["one"]
    assert client.opened[1:]


def test_patience_ends(clock: Clock) -> None:
    client = Client(*[Busy("full", 7.0)] * 100)
    with pytest.raises(Busy):
        session_of(client).call(Work(), "one")
    assert PATIENCE - 7.0 < clock.now <= PATIENCE


def test_without_any_worker_a_new_session_is_not_waited_for(clock: Clock) -> None:
    client = Client(*[NoWorker("none")] * 100_000)
    client.served = False
    with pytest.raises(NoWorker):
        session_of(client).call(Work(is_new=True), "one")
    assert clock.now == 0.0
    client.served = True
    with pytest.raises(NoWorker):
        session_of(client).call(Work(is_new=True), "one")
    assert clock.now > PATIENCE / 2


def test_the_first_worker_is_waited_for_if_there_is_none_at_all(clock: Clock) -> None:
    client = Client(*[NoWorker("nobody is here", "none")] * 3)
    client.served = False
    session_of(client).call(Work(None, is_new=True), "one")
    start = "start one with `lambda-split worker --model tiny`"
    assert client.said == [
        f"there is no worker yet: waiting 60 s for one; {start}",
        "worker worker-1 is there",
    ]
    client.refusals = [NoWorker("only others", "tiny layers 1:2")]
    with pytest.raises(NoWorker, match="only others"):
        session_of(client).call(Work(is_new=True), "one")


def test_a_slow_worker_is_left_once_in_a_step_and_named(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    session = session_of(client)
    with caplog.at_level("INFO"):
        session.call(Work(WorkerSlow("worker snail has not answered for 60 s"), None), "one")
    assert client.said == ["worker snail has not answered for 60 s; worker worker-2 has taken over"]
    # For whoever looks for the request in the logs of others.
    names = f"request req-1, session {session.identity.label}"
    assert f"{names}: worker snail has not answered for 60 s" in caplog.messages
    assert [session.patient for session in client.opened] == [False, True]
    session.call(Work(None), "two")
    assert not client.opened[-1].patient


def test_a_lost_worker_is_said_once_and_in_both_places() -> None:
    client, here = Client(), list[str]()
    session = ResilientSession(client, on_notice=here.append)  # type: ignore[arg-type]
    session.call(Work(WorkerGone("worker a is gone"), None), "one")
    assert client.said == here == ["worker a is gone; worker worker-2 has taken over"]
    session_of(client).call(Work(WorkerGone("worker a is gone"), None), "one")
    assert client.said[1:] == ["worker a is gone; worker worker-4 has taken over"]


def test_without_another_worker_the_wait_is_said_with_what_to_do(clock: Clock) -> None:
    client, work = Client(), Work(None, WorkerGone("worker a is gone"), None)
    session = session_of(client)
    session.call(work, "one")
    client.refusals = [NoWorker("none")] * 50
    session.call(work, "two")
    waiting = "worker a is gone: waiting 60 s for another one; start one with `lambda-split worker --model tiny`"
    assert client.said == [waiting, "worker worker-2 has taken over"]
    # Another session that loses the same worker need not repeat it.
    client.refusals = [NoWorker("none")]
    session_of(client).call(Work(WorkerGone("worker a is gone"), None), "one")
    assert client.said.count(waiting) == 1


def test_a_search_that_takes_long_is_said(clock: Clock) -> None:
    client, work = Client(), Work(None, WorkerGone("worker a is gone"), None)
    session = session_of(client)
    session.call(work, "one")
    opening = client.open_session

    def slowly(avoid: Any, number: int, epoch: int, check: Callable[[], None], never: Any) -> Remote:
        clock.now += LOOK
        return opening(avoid, number, epoch, check, never)

    client.open_session = slowly  # type: ignore[method-assign]
    client.refusals = [NoWorker("none")]
    session.call(work, "two")
    assert client.said == [
        "worker a is gone: looking for another one",
        "worker a is gone: waiting 60 s for another one; start one with `lambda-split worker --model tiny`",
        "worker worker-2 has taken over",
    ]


def test_full_workers_are_said_if_they_stay_full() -> None:
    client = Client(Busy("every worker is full", 0.5))
    session_of(client).call(Work(None), "one")
    assert client.said == []
    client.refusals = [Busy("every worker is full", 0.5)] * 5
    session_of(client).call(Work(None), "one")
    assert client.said == ["waiting 60 s for a worker: every worker is full"]


def test_when_no_other_worker_took_over_the_error_says_what_to_do() -> None:
    client, work = Client(), Work(None, WorkerGone("worker a is gone"))
    session = session_of(client)
    session.call(work, "one")
    client.refusals = [NoWorker("none")] * 100_000
    with pytest.raises(SessionLost) as lost:
        session.call(work, "two")
    assert str(lost.value) == (
        "worker a is gone, and no other took over within 60 s: start one with `lambda-split worker --model tiny`"
    )


def test_a_lost_session_for_which_workers_stay_full_is_not_called_lost() -> None:
    client, work = Client(), Work(None, SessionLost("evicted"), None)
    session = session_of(client)
    session.call(work, "one")
    client.refusals = [Busy("every worker is full", 0.5)] * 100_000
    with pytest.raises(Busy, match="every worker is full"):
        session.call(work, "two")
    assert session.waits_for_room
    client.refusals = []
    session.call(work, "two")
    assert not session.waits_for_room


def test_a_step_at_which_two_workers_fail_is_given_up() -> None:
    client, work = Client(), Work(StepFailed("it broke"), StepFailed("it broke"))
    with pytest.raises(StepFailed, match="it broke"):
        session_of(client).call(work, "one")
    (letter,) = dead_letters.read()
    assert letter.workers == ["worker-1", "worker-2"]
    assert (letter.rows, letter.tokens, letter.cached, letter.layers) == (1, 2, 3, "2:4")


@pytest.mark.parametrize(
    ("held", "in_replay", "deaths"),
    [(1, False, MAX_DEATHS), (2, False, 2 * MAX_DEATHS), (1000, False, 16), (1, True, 16)],
    ids=["alone", "shared", "shared by many", "before it was sent"],
)
def test_deaths_count_by_the_steps_that_share_the_blame(held: int, in_replay: bool, deaths: int) -> None:
    client, outcomes = Client(), [WorkerGone("gone", held)] * 100
    work = Work(replays=tuple(outcomes)) if in_replay else Work(*outcomes)
    with pytest.raises(StepFailed, match=f"{deaths} workers died"):
        session_of(client).call(work, "one")
    assert len(client.opened) == deaths
    assert deaths <= MAX_DEATHS / LEAST_DEATH


def test_a_workers_death_is_noted_once() -> None:
    blame, session = Blame(), Remote(1)
    noted = [blame.note(WorkerGone("gone"), session, sent=True) for _ in range(MAX_DEATHS)]  # type: ignore[arg-type]
    assert noted == [True, False, False, False]
    assert (blame.deaths, blame.workers, blame.is_enough) == (1.0, ["worker-1"], False)


def test_what_was_abandoned_is_interrupted_and_ends() -> None:
    client = Client()
    session = session_of(client)
    session.call(Work(None), "one")
    session.abandon()
    assert client.opened[0].interrupted
    with pytest.raises(SessionLost, match="given up"):
        session.call(Work(None), "two")


def test_its_session_is_closed_as_soon_as_it_is_forgotten() -> None:
    """Not by the garbage collector alone: the worker would hold it for long."""
    client = Client()
    session = session_of(client)
    session.call(Work(None), "one")
    del session
    assert client.opened[0].ended
