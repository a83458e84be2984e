"""Which worker a device is given, by tables; both transports ask this one policy."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from split_common.protocol import headers
from split_common.transport import peer_name
from split_common.transport.placement import (
    ANSWER_PATIENCE,
    GONE,
    MAX_DETAIL,
    MAX_ROOM,
    PASS_OVER,
    TRIAL,
    Assign,
    Candidate,
    PendingOpen,
    Refuse,
    Silences,
    Trials,
    Wait,
    choose,
    decide,
    full,
    served,
)

SERVICE, OTHER = headers.Service(b"r" * 32, 2, 4), headers.Service(b"x" * 32, 0, 1)
DEADLINE = 10.0
BUSY = Refuse("busy", "every worker is full", 1.0)
NOBODY = Refuse("busy", "there is no other worker", 1.0)


def peer(name: str) -> bytes:
    return name.encode().ljust(8, b"\0")


def worker(
    name: str, room: int, service: headers.Service = SERVICE, model: str = "tiny", certified: bool = True
) -> Candidate:
    """A worker; its member's name is what stands before a digit."""
    return Candidate(peer(name), service, model, room, name.rstrip("0123456789"), certified)


def pending(avoid: str = "", placed: bool = False) -> PendingOpen[bytes]:
    header = headers.Open(peer("device"), 7, SERVICE, [peer(name) for name in avoid.split()])
    return PendingOpen(header, (headers.encode_header(header), b"sealed"), DEADLINE, placed)


@pytest.mark.parametrize(
    ("workers", "avoid", "chosen"),
    [
        ([worker("a", 1)], "", "a"),
        ([worker("a", 1), worker("b", 3)], "", "b"),
        ([worker("a", 1), worker("b", 3), worker("c", 2)], "b", "c"),
        ([worker("a", 1), worker("b", 3), worker("c", 2)], "b c x", "a"),
        ([worker("a", 0), worker("b", 1)], "", "b"),
        ([worker("a", 9, OTHER), worker("b", 1)], "", "b"),
        ([worker("a", 9, headers.Service(SERVICE.root, 2, 5)), worker("b", 1)], "", "b"),
        # Of equals, the first.
        ([worker("b", 2), worker("a", 2)], "", "b"),
        ([worker("b", 2), worker("a", 2), worker("c", 2)], "b", "a"),
        ([worker("b", MAX_ROOM), worker("a", 2**61)], "", "b"),
        # Of one member's workers, the roomiest.
        ([worker("a1", 1), worker("a2", 3), worker("a3", 2)], "", "a2"),
        ([worker("a1", 1), worker("a2", 3), worker("b", 2), worker("a3", 2)], "", "a2"),
        # Those with a certificate first.
        ([worker("a", 9, certified=False), worker("b", 1)], "", "b"),
        ([worker("a", 9, certified=False), worker("b", 0)], "", "a"),
    ],
)
def test_the_roomiest_worker_that_is_not_avoided_is_chosen(
    workers: list[Candidate], avoid: str, chosen: str
) -> None:
    # Neither a restart of the queue nor the deadline keeps an open from a worker that has room.
    for early in (False, True):
        for now in (0.0, DEADLINE + 100):
            assert decide(pending(avoid), workers, early, now) == Assign(peer(chosen))


@pytest.mark.parametrize(
    ("workers", "avoid", "early", "late", "expected"),
    [
        # No worker of the service: what there is instead is told, unless workers may be about to come back.
        ([], "", False, False, Refuse("no-worker", "none")),
        ([worker("a", 3, OTHER)], "", False, False, Refuse("no-worker", "tiny 0:1 (a/00000000)")),
        ([worker("a", 3, OTHER)], "", False, True, Refuse("no-worker", "tiny 0:1 (a/00000000)")),
        ([], "", True, False, Wait()),
        ([worker("a", 3, OTHER)], "", True, True, Wait()),
        # All are full: it waits, but not beyond its deadline.
        ([worker("a", 0), worker("b", 0)], "", False, False, Wait()),
        ([worker("a", 0), worker("b", 0)], "", True, False, Wait()),
        ([worker("a", 0), worker("b", 0)], "", False, True, BUSY),
        ([worker("a", 0), worker("b", 0)], "", True, True, BUSY),
        # Those that are not avoided are full: one may have room soon.
        ([worker("a", 5), worker("b", 0)], "a", False, False, Wait()),
        ([worker("a", 5), worker("b", 0)], "a", False, True, BUSY),
        # All are avoided: waiting does not help, unless others may be about to come back.
        ([worker("a", 5), worker("b", 0)], "a b", False, False, NOBODY),
        ([worker("a", 5), worker("b", 0)], "a b", False, True, NOBODY),
        ([worker("a", 5), worker("b", 0)], "a b", True, False, Wait()),
        ([worker("a", 5), worker("b", 0)], "a b", True, True, BUSY),
        # Those of other services count neither as avoided nor as wanted.
        ([worker("a", 5), worker("c", 5, OTHER)], "a", False, False, NOBODY),
    ],
)
def test_an_open_that_no_worker_can_take_waits_or_is_refused(
    workers: list[Candidate], avoid: str, early: bool, late: bool, expected: Refuse | Wait
) -> None:
    assert decide(pending(avoid), workers, early, DEADLINE + 1 if late else DEADLINE) == expected


def test_an_open_that_any_worker_may_take_is_not_assigned_again() -> None:
    workers = [worker("a", 3)]
    assert decide(pending(placed=True), workers, False, 0.0) == Wait()
    assert decide(pending(placed=True), workers, False, DEADLINE + 1) == BUSY
    assert decide(pending(placed=True), [], False, 0.0) == Refuse("no-worker", "none")


# --- workers that do not answer, or claim too much ------------------------------------------------------------

SILENT_A = "worker 'a' did not answer"
OTHERS_FULL = Refuse("busy", f"{SILENT_A}, and every other worker is full", 1.0)


@pytest.mark.parametrize(
    ("workers", "silent", "moment", "expected"),
    [
        # Another one is given the open, however little room it has.
        ([worker("a", 9), worker("b", 1)], "a", "at first", Assign(peer("b"))),
        ([worker("a", 9), worker("a1", 9), worker("b", 1)], "a", "at first", Assign(peer("b"))),
        ([worker("a", 9), worker("b", 1, certified=False)], "a", "at first", Assign(peer("b"))),
        # It is waited for if it is full, and the refusal names the silent one.
        ([worker("a", 9), worker("b", 0)], "a", "at first", Wait()),
        ([worker("a", 9), worker("b", 0)], "a", "late", OTHERS_FULL),
        # Without another one, those that are silent are asked again; not for ever.
        ([worker("a", 9)], "a", "at first", Assign(peer("a"))),
        ([worker("a", 9)], "a", "late", Assign(peer("a"))),
        ([worker("a", 9), worker("c", 9, OTHER)], "a c", "later", Refuse("busy", SILENT_A, 1.0)),
        ([worker("a", 9), worker("b", 3)], "a b", "late", Assign(peer("a"))),
        ([worker("a", 9), worker("b", 3)], "a b", "later", Refuse("busy", "workers 'a', 'b' did not answer", 1.0)),
        ([worker("a", 0)], "a", "at first", Wait()),
        # Those of other services, and those that are gone, do not count.
        ([worker("a", 9, OTHER), worker("b", 1)], "a", "later", Assign(peer("b"))),
        ([worker("b", 1)], "a", "later", Assign(peer("b"))),
        ([worker("b", 0)], "a", "late", BUSY),
        ([], "a", "later", Refuse("no-worker", "none")),
    ],
)  # fmt: skip
def test_silent_workers_are_passed_over(
    workers: list[Candidate], silent: str, moment: str, expected: Assign | Refuse | Wait
) -> None:
    now = {"at first": 0.0, "late": DEADLINE + 1, "later": DEADLINE + ANSWER_PATIENCE + 1}[moment]
    assert decide(pending(), workers, False, now, silent.split()) == expected


def test_of_a_member_that_is_silent_its_other_workers_are_asked_first() -> None:
    workers = [worker("a1", 9), worker("a2", 3), worker("a3", 0)]
    asked: list[bytes] = []
    for expected in ("a1", "a2", "a1"):
        chosen = decide(pending(), workers, False, 0.0, ["a"], asked)
        assert chosen == Assign(peer(expected))
        asked.append(chosen.worker)


@pytest.mark.parametrize(
    ("events", "silent_until"),
    [
        ([("silent", 0)], 5),
        # What happens while it is passed over has the same cause.
        ([("silent", 0), ("silent", 1), ("silent", 4.9)], 5),
        # Each time counts twice the one before, to a limit.
        ([("silent", 0), ("silent", 5)], 15),
        ([("silent", 0), ("silent", 10), ("silent", 30)], 50),
        ([("silent", 100 * n) for n in range(5)], 400 + 80),
        ([("silent", 300 * n) for n in range(50)], 300 * 49 + 300),
        # An answer ends it, and what was before it.
        ([("silent", 0), ("answer", 1)], 0),
        ([("silent", 0), ("silent", 10), ("answer", 11), ("silent", 12)], 17),
        ([("answer", 0)], 0),
        # So does a long time.
        ([("silent", 0), ("silent", 5), ("silent", 15 + 300)], 320),
    ],
)
def test_who_is_silent_is_passed_over_for_longer_each_time_and_comes_back(
    events: list[tuple[str, float]], silent_until: float
) -> None:
    silences: Silences[str] = Silences(first=5.0, most=300.0)
    for what, now in events:
        silences.now(now)
        silences.note("a", now) if what == "silent" else silences.end("a")
    if silent_until:
        assert silences.now(silent_until - 0.01) == {"a"}
    assert silences.now(silent_until) == set()
    silences.note("b", silent_until)
    silences.now(silent_until + 1000)
    assert len(silences) == 0


# --- workers that have answered nobody yet -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "tried", "moment", "expected"),
    [
        # Another one is given the open, however little room it has; or is waited for, but not for long.
        ([worker("a", 9), worker("b", 1)], "a", "at first", Assign(peer("b"))),
        ([worker("a", 9), worker("b", 0)], "a", "at first", Wait()),
        ([worker("a", 9), worker("b", 0)], "a", "late", Assign(peer("a"))),
        # Without another one, it is not waited for.
        ([worker("a", 9)], "a", "at first", Assign(peer("a"))),
        ([worker("a", 9), worker("b", 1)], "a b", "at first", Assign(peer("a"))),
        ([worker("a", 9), worker("b", 9, OTHER)], "a", "at first", Assign(peer("a"))),
        # Nor is one that shows no certificate better.
        ([worker("a", 9), worker("b", 1, certified=False)], "a", "at first", Assign(peer("a"))),
    ],
)
def test_a_worker_that_is_tried_gets_others_devices_last(
    workers: list[Candidate], tried: str, moment: str, expected: Assign | Wait
) -> None:
    now = {"at first": 0.0, "late": DEADLINE + 1}[moment]
    assert decide(pending(), workers, False, now, tried=tried.split()) == expected


def test_a_worker_is_tried_by_one_device_until_a_device_says_that_it_has_answered() -> None:
    trials = Trials()
    trials.given("a", peer("one"), 0.0)
    trials.given("a", peer("two"), 1.0)
    assert trials.now(1.0) == {"a"}
    trials.asks_again(peer("two"), 1.0)
    trials.forget(peer("two"))
    assert trials.now(1.0) == {"a"}, "it is the first one's"
    trials.answered("a")
    assert trials.now(1.0) == set()
    trials.given("a", peer("one"), 2.0)
    assert trials.now(2.0) == set(), "it is known"


@pytest.mark.parametrize("how", ["the device asks for another", "time is up"])
def test_a_worker_that_did_not_answer_its_first_device_is_passed_over(how: str) -> None:
    trials = Trials()
    trials.given("a", peer("one"), 0.0)
    end = TRIAL if how == "time is up" else 1.0
    if how == "the device asks for another":
        trials.asks_again(peer("one"), end)
    assert trials.now(end) == {"a"}
    assert trials.now(end + PASS_OVER) == set()
    # The next device's trial is another one; after it, the worker is passed over for longer.
    trials.given("a", peer("two"), end + PASS_OVER)
    trials.asks_again(peer("two"), end + PASS_OVER)
    assert trials.now(end + 3 * PASS_OVER - 0.1) == {"a"}
    assert trials.now(end + 3 * PASS_OVER) == set()


def test_a_trial_ends_with_its_device() -> None:
    trials = Trials()
    trials.given("a", peer("one"), 0.0)
    trials.forget(peer("one"))
    assert trials.now(0.0) == set()


# --- spread ------------------------------------------------------------------------------------------------


def spread(workers: list[Candidate], opens: int, honest: bool = True, seed: int = 0) -> Counter[bytes]:
    """How many opens each worker is given; the room of honest ones becomes less by each."""
    random, given = Random(seed), Counter[bytes]()
    for _ in range(opens):
        chosen = decide(pending(), workers, False, 0.0, random=random)
        assert isinstance(chosen, Assign)
        given[chosen.worker] += 1
        workers = [
            one._replace(room=one.room - 1) if one.id == chosen.worker and one.room < 2**60 else one
            for one in workers
        ]
    return given


def names(count: int) -> list[str]:
    return [chr(ord("a") + number) for number in range(count)]


def test_honest_workers_get_about_the_same() -> None:
    for seed in range(20):
        given = spread([worker(name, 200) for name in names(20)], 20 * 30, seed=seed)
        # At random the busiest of them would have about 42.
        assert max(given.values()) <= 34
        assert min(given.values()) >= 20


def test_nothing_is_refused_before_all_are_full() -> None:
    workers = [worker(name, 8) for name in names(9)] + [worker("z", 128)]
    given = spread(workers, 9 * 8 + 128)
    assert [given[one.id] for one in workers] == [8] * 9 + [128]


@pytest.mark.parametrize("processes", [1, 50])
def test_a_claim_of_room_is_worth_at_most_twice_an_honest_share(processes: int) -> None:
    liars = [worker(f"z{number}", 2**61) for number in range(processes)]
    given = spread([worker(name, 900) for name in names(9)] + liars, 1000)
    assert 100 < sum(given[one.id] for one in liars) < 260


def test_a_draw_among_equals_reaches_all() -> None:
    workers = [worker(name, 1) for name in names(10)]
    random = Random(1)
    # All but the last, which never comes before the other of its pair.
    assert {choose(workers, random).id for _ in range(1000)} == {one.id for one in workers[:-1]}


def test_what_is_served_is_listed_once_each_and_in_order() -> None:
    workers = [
        worker("a", 0, headers.Service(bytes(32), 10, 12), "b"),
        worker("b", 0, headers.Service(bytes(32), 2, 4), "b"),
        worker("c", 0, headers.Service(bytes(32), 2, 4), "b"),
        worker("d", 0, headers.Service(bytes(32), 3, 5), "a"),
    ]
    a, b, c, d = (peer_name(one.member, one.id) for one in workers)
    assert served(workers) == f"a 3:5 ({d}), b 2:4 ({b}, {c}), b 10:12 ({a})"
    assert served([]) == "none"
    many = [worker(f"w{number}", 0) for number in range(7)]
    assert served(many).endswith(", 3 more)")


def test_a_refusal_names_the_message_that_it_is_about() -> None:
    relay = headers.Relay(peer("worker"), peer("device"), headers.RelayKind.REQUEST, 1, 2, 3, 4, 5)
    assert GONE.bounce(relay) == headers.Bounce(
        "gone", 1, 2, 4, peer("worker"), "the peer is not connected", 0.0, epoch=3
    )
    assert full("it is", 0.25).bounce(relay) == headers.Bounce(
        "full", 1, 2, 4, peer("worker"), "it is", 0.25, epoch=3
    )
    assert BUSY.bounce(pending().header) == headers.Bounce(
        "busy", 7, detail="every worker is full", retry_after=1.0
    )


def test_a_refusal_is_never_too_long_to_be_read() -> None:
    many = [worker(f"w{n}", 0, headers.Service(bytes(32), n, n + 1), "m" * 500) for n in range(64)]
    refusal = decide(pending(), many, False, 0.0)
    assert isinstance(refusal, Refuse)
    bounce = refusal.bounce(pending().header)
    assert len(bounce.detail) == MAX_DETAIL
    assert headers.decode_header(headers.encode_header(bounce)) == bounce
