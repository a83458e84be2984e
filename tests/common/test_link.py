"""The ZeroMQ link: who reads, and that it soon has another connection, whatever becomes of the one that it has."""

from __future__ import annotations

import contextlib
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from fleet import running_broker
from split_broker.broker import Broker
from split_common.protocol import headers
from split_common.transport import leader, new_peer_id, tcp, zmq_link
from split_common.transport.zmq_link import SILENCE, ZmqLink
from split_common.trust.fleet import load_fleet
from split_device.stress.proxy import Proxy
from wiretap import LATE, FakePeer, cheat, wait_until


class Peer:
    """A device that hands out the numbers of its messages by session, and notes who read them."""

    def __init__(self) -> None:
        self.id = new_peer_id("device-1")
        self.arrived: list[queue.SimpleQueue[int]] = [queue.SimpleQueue(), queue.SimpleQueue()]
        self.readers: dict[int, threading.Thread] = {}
        self.announcers: list[threading.Thread] = []

    def announcement(self) -> headers.Announce:
        self.announcers.append(threading.current_thread())
        return headers.Announce(self.id, "device", "device-1")

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        assert isinstance(header, headers.Relay)
        self.readers[header.seq] = threading.current_thread()
        self.arrived[header.session].put(header.seq)

    def on_gone(self, peers: Iterable[bytes]) -> None: ...
    def on_reset(self) -> None: ...
    def on_roster(self) -> None: ...


@pytest.fixture
def linked() -> Iterator[tuple[Proxy, ZmqLink]]:
    with running_broker() as broker:
        proxy = Proxy("127.0.0.1", int(broker.address.rpartition(":")[2]))
        fleet = load_fleet()
        link = ZmqLink(f"tcp://127.0.0.1:{proxy.port}", fleet, fleet.identity("device"))
        try:
            link.start(Peer(), 10)
            yield proxy, link
        finally:
            link.close()
            proxy.close()


def flip_what_comes_from_the_broker(proxy: Proxy) -> None:
    """Damages the next chunk on its way to the peer; CURVE makes that an error of the protocol."""
    [connection] = proxy._connections
    pump = connection.near.write

    def damaged(data: bytes) -> None:
        connection.near.write = pump  # type: ignore[method-assign]
        pump(data[:-1] + bytes([data[-1] ^ 1]))

    connection.near.write = damaged  # type: ignore[method-assign]


def hears_again(link: ZmqLink, fault: Callable[[], Any]) -> None:
    """After a fault, the broker's word arrives over another connection."""
    fault()
    time.sleep(1.5)  # meanwhile the fault strikes a heartbeat or its answer
    before = link.counters["messages_received"]
    wait_until(lambda: link.counters["messages_received"] > before and link.alive, SILENCE + LATE)


@pytest.mark.parametrize("waiting", [False, True], ids=["nobody_waits", "a_caller_waits"])
def test_damaged_bytes_from_the_broker(waiting: bool, linked: tuple[Proxy, ZmqLink]) -> None:
    """libzmq never connects again after an error of the protocol: the link has to."""
    proxy, link = linked
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            with pytest.raises(queue.Empty):
                link.receive(queue.SimpleQueue(), 0.25)

    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(wait if waiting else lambda: None)
        try:
            hears_again(link, lambda: flip_what_comes_from_the_broker(proxy))
        finally:
            over.set()
        caller.result(LATE)


@pytest.mark.parametrize("fault", ["reset", "truncate", "corrupt", "blackhole"])
def test_the_proxys_faults(fault: str, linked: tuple[Proxy, ZmqLink]) -> None:
    proxy, link = linked
    arguments = [1.0] if fault == "blackhole" else []
    hears_again(link, lambda: getattr(proxy, fault)(random.Random(1), *arguments))


# --- who reads ---------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A device's link, and a worker that sends it numbers."""

    broker: Broker
    device: Peer
    link: ZmqLink
    worker: FakePeer
    pool: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 4))

    def number(self, seq: int, session: int = 0) -> None:
        self.worker.send(headers.Relay(self.device.id, self.worker.id, headers.RelayKind.REPLY, 1, session, 0, seq))

    def receive(self, timeout: float = LATE, session: int = 0) -> int:
        return self.link.receive(self.device.arrived[session], timeout)

    def leave_the_lead(self) -> None:
        """The link's thread leaves it to callers, as if one had been here just now."""
        self.link._leader_lock._left = time.monotonic()
        if self.link._leader_lock.turn.locked():
            self.link._wake()
            wait_until(lambda: not self.link._leader_lock.turn.locked())

    def reading(self, session: int = 0) -> Any:
        """Has a caller read, and go on with it."""
        self.leave_the_lead()
        caller = self.pool.submit(self.receive, 600.0, session)
        wait_until(lambda: self.link._leader_lock.held_by_another)
        return caller


@pytest.fixture
def pair(patient_queue: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """No heartbeat is due, callers read for as long as they wait, and whoever has read may come back late."""
    monkeypatch.setattr(zmq_link, "HEARTBEAT", 600.0)
    monkeypatch.setattr(zmq_link, "SILENCE", 600.0)
    monkeypatch.setattr(leader, "LEAD_GAP", 600.0)
    monkeypatch.setattr(leader, "LEAD_WAIT", 600.0)
    with running_broker() as broker:
        assert isinstance(broker, Broker)
        device, fleet = Peer(), load_fleet()
        link = ZmqLink(broker.address, fleet, fleet.identity("device"))
        link.start(device, 10)
        with FakePeer(broker.address, fleet, fleet.identity("worker")) as worker:
            worker.join()
            made = Pair(broker, device, link, worker)
            try:
                yield made
            finally:
                link._leader_lock._wanted.set()
                link.close()
                for events in device.arrived:
                    events.put(-1)
                made.pool.shutdown()


def test_a_caller_that_waits_alone_reads_itself(pair: Pair) -> None:
    pair.leave_the_lead()
    for seq in range(20):
        pair.number(seq)
        assert pair.receive() == seq
    assert set(pair.device.readers.values()) == {threading.current_thread()}


def test_two_callers_wait_and_each_gets_its_own(pair: Pair) -> None:
    leader = pair.reading(session=0)
    other = pair.pool.submit(pair.receive, 600.0, 1)
    wait_until(lambda: pair.link._leader_lock._waiting)
    pair.number(1, session=1)
    assert other.result(LATE) == 1
    other = pair.pool.submit(pair.receive, 600.0, 1)
    wait_until(lambda: pair.link._leader_lock._waiting)
    pair.number(2, session=0)
    assert leader.result(LATE) == 2
    # The one who read has left: the link's thread reads for the other.
    pair.number(3, session=1)
    assert other.result(LATE) == 3
    assert pair.device.readers[1] is pair.device.readers[2]
    assert pair.device.readers[3] is pair.link._thread


def test_heartbeats_go_on_while_a_caller_reads(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = pair.reading()
    monkeypatch.setattr(zmq_link, "HEARTBEAT", 0.1)
    announcers = pair.device.announcers
    announcers.clear()
    # One that is due because something has changed is not put off; the others follow it.
    pair.link.announce()
    wait_until(lambda: len(announcers) > 3)
    assert pair.link._thread not in announcers
    seen = pair.broker._peers[pair.device.id].seen
    wait_until(lambda: pair.broker._peers[pair.device.id].seen > seen)
    pair.number(1)
    assert caller.result(LATE) == 1


def test_what_is_broken_does_not_reach_the_caller_that_reads(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_peer: Any, header: headers.AnyHeader, message: Any) -> list[Any]:
        if not isinstance(header, headers.Relay):
            return [message]
        head, body = message
        return [(b"\xffhead", body), (b"", body), (head[:-1], body), (head, body, body), (head, body)]

    cheat(pair.broker, broken)
    caller = pair.reading()
    # A handler that fails: there is no session 2.
    pair.number(1, session=2)
    wait_until(lambda: pair.link.counters["HandlerError"] == 1)
    assert pair.link.counters["Malformed"] == 3
    assert pair.link.counters["VersionMismatch"] == 1
    receive, failures = zmq_link.receive_frames, iter([zmq.ZMQError(zmq.EFAULT), MemoryError()])

    def failing(sock: Any, most: int) -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        return receive(sock, most)

    monkeypatch.setattr(zmq_link, "receive_frames", failing)
    pair.number(2)
    assert caller.result(LATE) == 2
    assert pair.device.readers[2] is not pair.link._thread
    assert pair.link.counters["failures"] == 2


def test_a_caller_that_gives_up_leaves_the_socket_to_the_link(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.leave_the_lead()
    monkeypatch.setattr(leader, "LEAD_GAP", 0.02)
    pair.link._leader_lock._wanted.set()
    pair.link._leader_lock._left = time.monotonic()
    with pytest.raises(queue.Empty):
        pair.receive(0.1)
    pair.number(1)
    wait_until(lambda: pair.device.readers)
    assert pair.device.readers[1] is pair.link._thread
    assert pair.receive() == 1


def test_a_caller_that_reads_sees_what_does_not_come_over_the_socket(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interruption of its session does."""
    monkeypatch.setattr(leader, "LEAD_WAIT", 0.05)
    caller = pair.reading()
    pair.device.arrived[0].put(7)
    assert caller.result(LATE) == 7


def test_who_sends_takes_nothing_from_the_caller_that_reads(pair: Pair) -> None:
    """libzmq says only once that something has arrived, and perhaps to the one who sends."""
    about_to_wait, sent = threading.Event(), threading.Event()
    poll = pair.link._poller.poll

    def late_poll(milliseconds: int) -> Any:
        about_to_wait.set()
        assert sent.wait(LATE)
        return poll(milliseconds)

    pair.leave_the_lead()
    pair.link._poller = SimpleNamespace(poll=late_poll)  # type: ignore[assignment]
    caller = pair.reading()
    assert about_to_wait.wait(LATE)
    pair.number(1)
    wait_until(lambda: poll(0))
    pair.link.send(headers.Relay(pair.worker.id, pair.device.id, headers.RelayKind.REQUEST, 1))
    sent.set()
    assert caller.result(LATE) == 1


def test_what_is_sent_while_the_socket_is_in_use_goes_out_at_once(pair: Pair) -> None:
    """The garbage collector may send in the very thread that uses the socket, whose caller may not come back."""
    ready, wanted = pair.link._ready, [headers.Relay(pair.worker.id, pair.device.id, headers.RelayKind.REQUEST, 1)]

    def ready_and_sending(sock: Any) -> int:
        events = ready(sock)
        if events and wanted:
            pair.link.send(wanted.pop())
        return events

    pair.leave_the_lead()
    pair.link._ready = ready_and_sending  # type: ignore[method-assign]
    pair.number(1)
    assert pair.receive() == 1
    assert not wanted
    pair.worker.receive(headers.Relay)


def test_a_link_can_be_closed_while_a_caller_reads(pair: Pair) -> None:
    caller = pair.reading()
    closing = pair.pool.submit(pair.link.close)
    closing.result(LATE)
    pair.device.arrived[0].put(7)
    assert caller.result(LATE) == 7


def test_a_silent_link_connects_again_though_its_heartbeat_cannot_be_sent(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all that has arrived first; that the socket could also be written to must not keep it there."""
    old = pair.link._sock
    with monkeypatch.context() as patch:
        patch.setattr(pair.link, "_send_announcement", lambda *_, **__: False)
        patch.setattr(zmq_link, "SILENCE", 0.0)
        pair.link.announce()
        wait_until(lambda: pair.link._sock is not old)

    def hears() -> bool:
        # What is sent while the broker still knows the old connection may be lost.
        pair.link.announce()
        pair.number(1)
        with contextlib.suppress(queue.Empty):
            return pair.receive(1.0) == 1
        return False

    wait_until(hears)


@pytest.mark.skipif(not tcp.COUNTED, reason="this system does not count a connection's bytes")
def test_what_a_link_writes_is_counted_to_the_byte(pair: Pair) -> None:
    """Else a broker that hangs would look alive after a while: its kernel still takes heartbeats."""
    progress = pair.link._progress

    def differ() -> int:
        traffic = tcp.traffic(progress._fd, progress._inode)
        assert traffic is not None
        return traffic.acknowledged - progress._handed

    pair.link.announce()
    wait_until(lambda: progress._fd >= 0)
    # What is under way makes the difference smaller, such as a heartbeat that comes just now.
    before, handed = -math.inf, progress._handed
    for _ in range(20):
        time.sleep(0.02)
        before = max(before, differ())
    for size in (0, 100, 250, 5000, 200_000):
        pair.link.send(headers.RosterRequest(pair.link._sender), bytes(size))
        pair.link.announce()
    wait_until(lambda: progress._handed > handed + 200_000 and differ() == before)
