"""Shares of members in the broker: of a queue, of all queues, of opens, and of messages a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from split_broker import broker as broker_module
from split_broker import opens as opens_module
from split_broker import peer_queue as peer_queue_module
from split_broker import under_way as under_way_module
from split_broker.broker import GRACE, Broker
from split_broker.peer_queue import Peer, PeerQueue, Queued
from split_broker.quotas import OPENS, ROSTER_REQUESTS, Budget, Rate, Rates
from split_broker.under_way import SHARED_WINDOW, WRITING_FOR
from split_common.protocol import headers
from split_common.protocol.handshake import MAX_HANDSHAKE
from split_common.trust.fleet import load_fleet
from split_common.trust.shares import Usage

SERVICE = headers.Service(b"r" * 32, 2, 4)


def waiting(queue: PeerQueue) -> list[str]:
    """The senders of what waits, in the order in which it is sent."""
    taken = []
    while (queued := queue.take()) is not None:
        taken.append(queued.sender)
    return taken


# --- what is under way ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which stands still unless a test sets `now`."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(under_way_module, "time", clock)
    return clock


def test_one_that_floods_a_peer_has_little_under_way_while_others_write_to_it(clock: SimpleNamespace) -> None:
    queue = PeerQueue()
    queue.credit(0)
    size = SHARED_WINDOW // 4
    assert queue.skip(100, "other")
    flood = (b"", bytes(size))
    while queue.skip(size, "flood"):
        pass
    assert queue.under_way.bytes == 100 + SHARED_WINDOW + size
    assert queue.put(flood, "flood")
    assert queue.put((b"", b"x"), "other")
    taken = queue.take()
    assert taken is not None
    assert taken.sender == "other", "its message does not wait behind the flood"
    assert queue.take() is None
    # What the peer confirms makes room for as much.
    queue.credit(100 + 2 * size)
    assert [taken.sender if (taken := queue.take()) else None for _ in range(2)] == ["flood", None]


def test_one_that_writes_to_a_peer_alone_has_the_whole_window(clock: SimpleNamespace) -> None:
    queue = PeerQueue()
    queue.credit(0)
    assert queue.skip(100, "other")
    clock.now = WRITING_FOR + 0.1
    while queue.skip(SHARED_WINDOW, "one"):
        pass
    assert queue.under_way.bytes > under_way_module.WINDOW


def test_what_a_full_socket_did_not_take_is_not_under_way(clock: SimpleNamespace) -> None:
    queue = PeerQueue()
    queue.credit(0)
    assert queue.skip(100, "other")
    assert queue.skip(SHARED_WINDOW, "one")
    assert queue.skip(1, "one")
    assert not queue.skip(1, "one")
    queue.unskip(1, "one")
    assert queue.skip(1, "one")
    queue.reconnected()
    queue.unskip(1, "one")
    assert (queue.under_way.sent, queue.under_way.bytes) == (0, 0), "the connection was lost while it was used"
    assert queue.skip(SHARED_WINDOW, "one")
    assert queue.skip(1, "one")


# --- one queue ---------------------------------------------------------------------------------------------


def test_senders_take_turns_and_each_ones_messages_stay_in_order() -> None:
    queue = PeerQueue()
    for number in range(4):
        assert queue.put((b"", bytes([number])), "flood")
    assert queue.put((b"", b"\x07"), "other")
    taken = [queued for _ in range(5) if (queued := queue.take()) is not None]
    assert [queued.sender for queued in taken] == ["flood", "other", "flood", "flood", "flood"]
    assert [queued.message[1] for queued in taken if queued.sender == "flood"] == [b"\0", b"\1", b"\2", b"\3"]


def test_what_need_not_wait_is_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_way_module, "WINDOW", 1000)
    usage = Usage()
    queue = PeerQueue("device-1", usage)
    queue.credit(0)
    assert queue.skip(800)
    assert queue.skip(800)
    assert not queue.skip(1), "there is no credit left"
    assert (queue.under_way.sent, usage["device-1"]) == (1600, 1600)
    queue.unskip(800)
    assert (queue.under_way.sent, usage["device-1"]) == (800, 800)
    queue.put((b"", b"x"), "one")
    assert not queue.skip(1), "another message waits"
    queue.clear()
    assert usage.total == 0


def test_what_the_socket_did_not_take_goes_first_again() -> None:
    queue = PeerQueue()
    for number in range(3):
        queue.put((b"", bytes([number])), "one")
    queue.put((b"", b"x"), "other")
    first = queue.take()
    assert first is not None
    queue.put_back(first)
    assert queue.under_way.sent == 0
    assert queue.take() == first
    assert waiting(queue) == ["other", "one", "one"]


@pytest.mark.parametrize(("size", "most"), [(100, {"QUEUE_BYTES": 1000}), (1, {"QUEUE_MESSAGES": 10})])
def test_whoever_fills_a_queue_makes_room_for_others(
    size: int, most: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in most.items():
        monkeypatch.setattr(peer_queue_module, name, value)
    lost: list[Queued] = []
    queue = PeerQueue(gave_way=lost.append)
    accepted = [queue.put((b"", bytes(size)), "flood") for _ in range(12)]
    assert accepted == [True] * 10 + [False] * 2
    assert not lost
    # Up to an equal share; then each is told that the queue is full.
    assert [queue.put((b"", bytes(size)), "other") for _ in range(6)] == [True] * 5 + [False]
    assert [queued.sender for queued in lost] == ["flood"] * 5
    assert not queue.put((b"", bytes(size)), "flood")
    # A third one takes from both.
    assert [queue.put((b"", bytes(size)), "third") for _ in range(5)] == [True] * 4 + [False]
    assert sorted(Counter(waiting(queue)).values()) == [3, 3, 4]


def test_a_queue_counts_what_waits_and_what_is_under_way() -> None:
    usage = Usage()
    queue = PeerQueue("device-1", usage)
    queue.credit(0)
    for _ in range(3):
        queue.put((b"", bytes(100)), "worker-1")
    queue.take()
    queue.take()
    assert usage["device-1"] == usage.total == 300
    queue.credit(100)
    assert usage["device-1"] == 200
    queue.reconnected()
    assert usage["device-1"] == 100
    queue.clear()
    assert usage.total == 0
    assert not list(usage)


# --- all queues --------------------------------------------------------------------------------------------


def peer(budget: Budget, member: str, lost: list[Queued]) -> Peer:
    return Peer(member.encode(), b"", "device", member, PeerQueue(member, budget.usage, lost.append))


def test_the_member_that_holds_the_most_makes_room_for_others() -> None:
    budget, lost, ended = Budget(1000), list[Queued](), list[Peer]()
    slow, other = peer(budget, "slow", lost), peer(budget, "other", lost)
    peers = [slow, other]

    def put(to: Peer) -> bool:
        return budget.make_room(to.member, 100, peers, ended.append) and to.queue.put((b"", bytes(100)), "worker-1")

    assert [put(slow) for _ in range(11)] == [True] * 10 + [False]
    assert [put(other) for _ in range(6)] == [True] * 5 + [False]
    assert len(lost) == 5
    assert (budget.usage["slow"], budget.usage["other"]) == (500, 500)
    assert not ended


def test_a_member_that_reads_nothing_of_what_is_under_way_loses_its_connection() -> None:
    budget, ended = Budget(1000), list[Peer]()
    slow, other = peer(budget, "slow", []), peer(budget, "other", [])
    for _ in range(10):
        slow.queue.put((b"", bytes(100)), "worker-1")
        slow.queue.take()

    def end(one: Peer) -> None:
        ended.append(one)
        one.queue.reconnected()

    assert budget.make_room("other", 100, [slow, other], end)
    assert ended == [slow]
    assert budget.usage.total == 0


# --- the broker --------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """A broker whose loop does not run, with devices of two members; what it would send is kept in `sent`."""
    broker = Broker("tcp://127.0.0.1:*", load_fleet())
    broker._started -= GRACE
    broker.sent = []  # type: ignore[attr-defined]
    monkeypatch.setattr(
        broker._router,
        "send",
        lambda route, message: broker.sent.append((route, headers.decode_header(message[0]))),  # type: ignore[attr-defined]
    )
    for route, role, member in (
        (b"a1", "device", "a"),
        (b"a2", "device", "a"),
        (b"b1", "device", "b"),
        (b"w1", "worker", "w"),
    ):
        service = SERVICE if role == "worker" else None
        broker._announced(headers.Announce(id_of(route), role, member, service=service), route, member)
    broker.sent.clear()  # type: ignore[attr-defined]
    yield broker
    broker.stop()


def id_of(route: bytes) -> bytes:
    return route.ljust(8, b"-")


def handle(broker: Broker, route: bytes, header: headers.Header, body: bytes = b"") -> None:
    frames = [SimpleNamespace(bytes=route), SimpleNamespace(bytes=headers.encode_header(header)), body]
    broker._supervisor.run(broker._take, frames)  # type: ignore[arg-type]


def told(broker: Broker, route: bytes) -> list[str]:
    return [one.reason for to, one in broker.sent if to == route and isinstance(one, headers.Bounce)]  # type: ignore[attr-defined]


def test_a_message_that_gave_way_comes_back_as_full(offline: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    offline._peers[id_of(b"w1")].queue.under_way.sent = 2 * under_way_module.WINDOW  # its credit is used up
    monkeypatch.setattr(peer_queue_module, "QUEUE_MESSAGES", 4)
    for seq in range(4):
        handle(offline, b"a1", headers.Relay(id_of(b"w1"), id_of(b"a1"), headers.RelayKind.REQUEST, 1, 1, 0, seq))
    assert told(offline, b"a1") == []
    handle(offline, b"b1", headers.Relay(id_of(b"w1"), id_of(b"b1"), headers.RelayKind.REQUEST, 1, 1))
    assert told(offline, b"a1") == ["full"]
    assert told(offline, b"b1") == []
    [(_, bounce)] = offline.sent  # type: ignore[attr-defined]
    assert bounce.seq == 3


def test_a_hello_is_no_larger_than_a_handshake(offline: Broker) -> None:
    handle(offline, b"a1", headers.Open(id_of(b"a1"), 1, SERVICE), bytes(MAX_HANDSHAKE + 1))
    assert offline.counters["Oversized"] == 1
    assert not offline._opens.pending
    handle(offline, b"a1", headers.Open(id_of(b"a1"), 1, SERVICE), bytes(MAX_HANDSHAKE))
    assert list(offline._opens.pending) == [id_of(b"a1")]


def test_the_member_with_the_most_pending_opens_loses_its_newest(
    offline: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens_module, "MAX_PENDING", 2)
    for route in (b"a1", b"a2"):
        handle(offline, route, headers.Open(id_of(route), 1, SERVICE))
    handle(offline, b"b1", headers.Open(id_of(b"b1"), 1, SERVICE))
    assert list(offline._opens.pending) == [id_of(b"a1"), id_of(b"b1")]
    assert told(offline, b"a2") == ["busy"]
    # A device that repeats its own takes no further place, and a member does not push out one with as many.
    handle(offline, b"b1", headers.Open(id_of(b"b1"), 2, SERVICE))
    handle(offline, b"a2", headers.Open(id_of(b"a2"), 2, SERVICE))
    assert list(offline._opens.pending) == [id_of(b"a1"), id_of(b"b1")]
    assert told(offline, b"a2") == ["busy", "busy"]


def test_messages_that_cost_more_than_they_weigh_have_a_rate(offline: Broker) -> None:
    offline._rates._buckets[OPENS] = offline._rates._buckets[ROSTER_REQUESTS] = SimpleNamespace(  # type: ignore[assignment]
        take=lambda member, _weight: member != "a"
    )
    handle(offline, b"a1", headers.Open(id_of(b"a1"), 1, SERVICE))
    handle(offline, b"a2", headers.RosterRequest(id_of(b"a2")))
    assert told(offline, b"a1") == ["busy"]
    assert offline.counters["too_often"] == 2
    # An answer takes as long as another's message: to those who never stop they are not given.
    for number in range(2, 300):
        handle(offline, b"a1", headers.Open(id_of(b"a1"), number, SERVICE))
    assert len(told(offline, b"a1")) < 200
    handle(offline, b"b1", headers.RosterRequest(id_of(b"b1")))
    assert [type(header) for to, header in offline.sent if to == b"b1"] == [headers.RosterReply]  # type: ignore[attr-defined]
    assert not [header for to, header in offline.sent if to == b"a2"]  # type: ignore[attr-defined]


def test_a_rate_is_each_members_own() -> None:
    rates, rate = Rates(), Rate(0.0, 3)
    assert [rates.admits("a", rate) for _ in range(5)] == [True] * 3 + [False] * 2
    assert rates.admits("b", rate)
    assert rates.admits("a", OPENS)


def test_a_message_may_count_as_several() -> None:
    rates, rate = Rates(), Rate(0.0, 4.0)
    assert rates.admits("a", rate, 3.0)
    assert not rates.admits("a", rate, 1.5)
    assert rates.admits("a", rate)


def test_a_heartbeat_that_watches_strangers_counts_as_many(offline: Broker) -> None:
    strangers = [number.to_bytes(8, "big") for number in range(160)]
    watching = headers.Announce(b"12345678", "device", "device-1", watching=strangers)
    # While the broker is new, peers that are alive may not have announced themselves.
    offline._started = time.monotonic()
    assert offline._weight(watching) == 1
    offline._started -= GRACE
    assert offline._weight(watching) == 11
    assert offline._weight(headers.Announce(b"12345678", "device", "device-1", watching=[id_of(b"a1")])) == 1


def test_long_headers_are_counted_before_they_are_read(offline: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "LONG_HEADERS", Rate(0.0, 1024.0**2))
    read: list[int] = []
    decode = headers.decode_header
    monkeypatch.setattr(headers, "decode_header", lambda head: (read.append(len(head)), decode(head))[1])
    strangers = [number.to_bytes(8, "big") for number in range(headers.MAX_WATCHED)]
    watching = headers.Announce(id_of(b"a1"), "device", "device-1", watching=strangers)
    for _ in range(50):
        handle(offline, b"a1", watching)
    admitted = 1024**2 // len(headers.encode_header(watching))
    assert len(read) == admitted < 50
    assert offline.counters["too_often"] == 50 - admitted
    # What is short is read all the same, and so is what others send.
    handle(offline, b"a1", headers.Probe())
    handle(offline, b"b1", watching)
    assert len(read) == admitted + 2


def test_long_headers_count_for_their_member_before_it_is_announced(
    offline: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections send them, and though none of their heartbeats is admitted."""
    monkeypatch.setattr(broker_module, "LONG_HEADERS", Rate(0.0, 1024.0**2))
    monkeypatch.setattr(broker_module, "ANNOUNCEMENTS", Rate(0.0, 0.0))
    monkeypatch.setattr(offline._authentication, "owner", lambda envelope: envelope.bytes[:1].decode())
    monkeypatch.setattr(offline._authentication, "member", lambda envelope, _: envelope.bytes[:1].decode())
    read: list[int] = []
    decode = headers.decode_header
    monkeypatch.setattr(headers, "decode_header", lambda head: (read.append(len(head)), decode(head))[1])
    strangers = [number.to_bytes(8, "big") for number in range(headers.MAX_WATCHED)]
    watching = headers.Announce(id_of(b"c1"), "device", "c", watching=strangers)
    for number in range(50):
        handle(offline, f"c{number}".encode(), watching)
    assert len(read) == 1024**2 // len(headers.encode_header(watching)) < 50
    before = len(read)
    handle(offline, b"d1", watching)
    assert len(read) == before + 1


def test_kinds_of_messages_with_the_same_rate_do_not_share_it() -> None:
    rates, kinds = Rates(), [Rate(0.0, 3.0), Rate(0.0, 3.0)]
    assert [rates.admits("m", kind) for kind in kinds for _ in range(4)] == [True, True, True, False] * 2


def test_leaving_counts_for_all_that_are_told(offline: Broker) -> None:
    leaving = headers.Announce(id_of(b"w1"), "worker", "w", leaving=True)
    assert offline._weight(leaving) == 1
    for route in (b"a1", b"a2", b"b1"):
        offline._peers[id_of(route)].watching = frozenset([id_of(b"w1")])
    assert offline._weight(leaving) == 1 + 3 / 16


def test_announcements_give_opens_now_and_then(offline: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[headers.Service | None] = []
    monkeypatch.setattr(offline._opens, "place", lambda *_: placed.append(SERVICE))
    monkeypatch.setattr(broker_module, "PLACE_INTERVAL", 1000.0)
    offline._peers[id_of(b"w1")].placed = float("-inf")
    for room in (0, 0, 1, 1, 1):
        announcement = headers.Announce(id_of(b"w1"), "worker", "w", service=SERVICE, room=room)
        offline._announced(announcement, b"w1", "w")
    assert placed == [SERVICE]


def test_who_is_not_announced_is_told_so_now_and_then(offline: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "UNANNOUNCED", Rate(0.0, 3.0))
    monkeypatch.setattr(offline._authentication, "owner", lambda envelope: envelope.bytes[:1].decode())
    for number in range(20):
        handle(offline, f"c{number}".encode(), headers.RosterRequest(id_of(b"c1")))
    handle(offline, b"d1", headers.RosterRequest(id_of(b"d1")))
    assert [to for to, _ in offline.sent] == [b"c0", b"c1", b"c2", b"d1"]  # type: ignore[attr-defined]
    assert offline.counters["unannounced"] == 21
