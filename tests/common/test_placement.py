"""Which worker a device is given, by tables; both transports ask this one policy."""

from __future__ import annotations

import pytest

from split_common.protocol import headers
from split_common.transport.placement import (
    GONE,
    MAX_DETAIL,
    Assign,
    Candidate,
    PendingOpen,
    Refuse,
    Wait,
    decide,
    full,
    served,
)

SERVICE, OTHER = headers.Service(b"r" * 32, 2, 4), headers.Service(b"x" * 32, 0, 1)
DEADLINE = 10.0
BUSY = Refuse("busy", "every worker is full", 1.0)


def peer(name: str) -> bytes:
    return name.encode().ljust(8, b"\0")


def worker(name: str, room: int, service: headers.Service = SERVICE, model: str = "tiny") -> Candidate:
    return Candidate(peer(name), service, model, room)


def pending(avoid: str = "", placed: bool = False) -> PendingOpen[bytes]:
    header = headers.Open(peer("device"), 7, SERVICE, [peer(name) for name in avoid.split()])
    return PendingOpen(header, (headers.encode_header(header), b"sealed"), DEADLINE, placed)


@pytest.mark.parametrize(
    ("workers", "avoid", "chosen"),
    [
        ([worker("a", 1)], "", "a"),
        ([worker("a", 1), worker("b", 3), worker("c", 2)], "", "b"),
        ([worker("a", 1), worker("b", 3), worker("c", 2)], "b", "c"),
        ([worker("a", 1), worker("b", 3), worker("c", 2)], "b c x", "a"),
        ([worker("a", 0), worker("b", 1)], "", "b"),
        ([worker("a", 9, OTHER), worker("b", 1)], "", "b"),
        ([worker("a", 9, headers.Service(SERVICE.root, 2, 5)), worker("b", 1)], "", "b"),
        # Of equals, the first.
        ([worker("b", 2), worker("a", 2), worker("c", 2)], "", "b"),
        ([worker("b", 2), worker("a", 2), worker("c", 2)], "b", "a"),
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
        ([worker("a", 3, OTHER)], "", False, False, Refuse("no-worker", "tiny layers 0:1")),
        ([worker("a", 3, OTHER)], "", False, True, Refuse("no-worker", "tiny layers 0:1")),
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
        ([worker("a", 5), worker("b", 0)], "a b", False, False, BUSY),
        ([worker("a", 5), worker("b", 0)], "a b", True, False, Wait()),
        ([worker("a", 5), worker("b", 0)], "a b", True, True, BUSY),
        # Those of other services count neither as avoided nor as wanted.
        ([worker("a", 5), worker("c", 5, OTHER)], "a", False, False, BUSY),
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


def test_what_is_served_is_listed_once_each_and_in_order() -> None:
    workers = [
        worker("a", 0, headers.Service(bytes(32), 10, 12), "b"),
        worker("b", 0, headers.Service(bytes(32), 2, 4), "b"),
        worker("c", 0, headers.Service(bytes(32), 2, 4), "b"),
        worker("d", 0, headers.Service(bytes(32), 3, 5), "a"),
    ]
    assert served(workers) == "a layers 3:5, b layers 2:4, b layers 10:12"


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
