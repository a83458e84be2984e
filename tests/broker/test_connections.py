"""What one connection or member can make the broker hold, and what ends it. Others are served meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import tiny
from split_broker import connections as connections_module
from split_broker import router as router_module
from split_broker import under_way as under_way_module
from split_broker.broker import GRACE, Broker
from split_broker.connections import STRANGER_BYTES, Connection
from split_common.protocol import headers
from split_common.system.process import running_command
from split_common.transport import new_peer_id
from split_common.transport.base import HEARTBEAT
from split_common.transport.progress import LEAST_PROGRESS, UNFINISHED_BYTES
from split_common.trust.fleet import load_fleet
from wiretap import FakePeer, Setting, on_loop, wait_until
from zmtp import RawPeer, zmtp_frame

SERVICE = headers.Service(b"r" * 32, 2, 4)

pytestmark = pytest.mark.usefixtures("patient_queue")

Join = Callable[[str], FakePeer]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))
    setting.fleet.add_member("device", "device-2")
    return setting


@pytest.fixture
def broker(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """Nothing ends a connection but what it holds."""
    monkeypatch.setattr(router_module, "HANDSHAKE_LIMIT", 0)
    monkeypatch.setattr(connections_module, "STRANGER_LIFETIME", 3600.0)
    with setting.broker() as running:
        running._started -= GRACE
        yield running


@pytest.fixture
def join(setting: Setting, broker: Broker) -> Iterator[Join]:
    with contextlib.ExitStack() as stack:

        def make(member: str) -> FakePeer:
            peer = stack.enter_context(FakePeer(broker.address, setting.fleet, setting.fleet.read_identity(member)))
            peer.join(**({"service": SERVICE, "room": 3} if peer.role == "worker" else {}))
            return peer

        yield make


def raw(broker: Broker, setting: Setting, member: str, **options: int) -> RawPeer:
    return RawPeer(broker.address, setting.fleet, setting.fleet.read_identity(member), **options)


def announcement(member: str, id_: bytes | None = None, received: int = 0) -> headers.Announce:
    return headers.Announce(id_ or new_peer_id(member), "device", member, received)


def connections(broker: Broker) -> list[Connection]:
    found: list[Connection] = []
    on_loop(broker, lambda: found.extend(broker._router.connections))
    return found


# --- messages without an end -------------------------------------------------------------------------------


def test_a_stranger_that_fills_a_handshake_is_cut_off(broker: Broker) -> None:
    with RawPeer(broker.address) as stranger:
        # A command that is as large as a frame may be, of which the rest never comes.
        stranger.socket.sendall(b"\x06" + headers.MAX_FRAME.to_bytes(8) + bytes(2 * STRANGER_BYTES))
        assert stranger.ended()
    wait_until(lambda: broker.counters["connections_unfinished"] == 1)


def test_a_stranger_that_does_not_shake_hands_is_cut_off(setting: Setting) -> None:
    with setting.broker() as broker, RawPeer(broker.address) as stranger:
        assert stranger.ended()


def test_a_member_that_announces_nothing_may_send_little(broker: Broker, setting: Setting, join: Join) -> None:
    other = join("device-2")
    with raw(broker, setting, "device-1") as peer:
        peer.send_without_end(2 * STRANGER_BYTES)
        assert peer.ended()
    wait_until(lambda: broker.counters["connections_unfinished"] == 1)
    other.join()


def test_a_members_message_without_an_end_ends_its_connection_and_bars_it(
    broker: Broker, setting: Setting, join: Join
) -> None:
    other = join("device-2")
    with raw(broker, setting, "device-1") as peer:
        peer.send_header(announcement("device-1"))
        wait_until(lambda: "device-1" in [one.member for one in connections(broker)])
        peer.send_without_end(UNFINISHED_BYTES + (1 << 20))
        assert peer.ended()
    other.join()
    with FakePeer(broker.address, setting.fleet, setting.fleet.read_identity("device-1")) as again:
        again.announce()
        wait_until(lambda: broker.counters["AuthenticationError"] >= 1)
    broker._authentication._barred.clear()
    join("device-1").join()


def test_the_largest_messages_end_no_connection(broker: Broker, join: Join) -> None:
    device, worker = join("device-1"), join("worker-1")
    for seq in range(4):
        device.send(
            headers.Relay(worker.id, device.id, headers.RelayKind.REQUEST, 1, 1, 0, seq), bytes(headers.MAX_BODY)
        )
    for seq in range(4):
        assert worker.receive(headers.Relay)[0].seq == seq
    broker._router._guard._next_members = 0.0
    on_loop(broker, lambda: None)
    on_loop(broker, lambda: None)
    device.join()
    assert not [name for name in broker.counters if name.startswith("connections_")]


def test_a_message_of_thousands_of_frames_ends_its_connection(broker: Broker, join: Join) -> None:
    device, other = join("device-1"), join("device-2")
    device.socket.send_multipart([headers.encode_header(headers.RosterRequest(device.id)), *[b""] * 5000])
    wait_until(lambda: broker.counters["connections_too_many_frames"])
    assert broker.counters["Malformed"] == 1
    other.join()


def test_a_peer_whose_heartbeat_is_behind_a_slow_message_is_alive(broker: Broker, setting: Setting) -> None:
    with raw(broker, setting, "device-1") as peer:
        peer.send_header(announcement("device-1"))
        wait_until(lambda: "device-1" in [one.member for one in connections(broker)])
        [connection] = connections(broker)
        [known] = broker._peers.values()
        known.seen -= 2.5 * HEARTBEAT
        wait_until(lambda: connection.looked_at is not None)
        assert broker._router.connections.last_sign(known.route, known.seen, time.monotonic()) == known.seen
        peer.send(bytes(16 * LEAST_PROGRESS), more=True)
        wait_until(lambda: connection.moved > known.seen + 2 * HEARTBEAT)


# --- what is counted ---------------------------------------------------------------------------------------


def test_what_a_connection_holds_is_counted_to_the_byte(broker: Broker, join: Join) -> None:
    """Sizes on both sides of where ZMTP's frames change their form, with CURVE's part."""
    device, worker = join("device-1"), join("worker-1")
    sizes = [0, 1, 219, 220, 221, 222, 223, 255, 256, 257, 65536, 1_000_000] * 20
    for size in sizes:
        device.send(headers.Relay(worker.id, device.id, headers.RelayKind.REQUEST, 1, 1), bytes(size))
    for _ in sizes:
        worker.receive(headers.Relay)
    device.join()
    # What is left is the handshake's.
    assert all(0 <= (one.unread() or 0) < 1000 for one in connections(broker))
    wait_until(lambda: all(one.unsent() == 0 for one in connections(broker)))
    handed = sum(one.handed for one in connections(broker))
    assert handed > sum(sizes)


def test_a_peer_that_reads_nothing_gets_no_credit_for_saying_that_it_does(
    broker: Broker, setting: Setting, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, size, count = 1 << 20, 1 << 18, 100
    monkeypatch.setattr(under_way_module, "WINDOW", window)
    worker, id_ = join("worker-1"), new_peer_id("device-1")
    with raw(broker, setting, "device-1", buffer=65536) as liar:
        liar.send_header(announcement("device-1", id_))
        wait_until(lambda: id_ in broker._peers)
        queue = broker._peers[id_].queue
        for seq in range(count):
            worker.send(headers.Relay(id_, worker.id, headers.RelayKind.REPLY, 1, 1, 0, seq), bytes(size))
            liar.send_header(announcement("device-1", id_, received=2**60))
        wait_until(lambda: len(queue) and queue.under_way.sent + queue.waiting_bytes >= count * size)
        [connection] = [one for one in connections(broker) if one.member == "device-1"]
        # What the kernels' buffers take has left the broker; they are far smaller than all of it.
        assert 0 < (connection.unsent() or 0) < window + 2 * size
        assert len(queue) > count // 4


# --- how many ----------------------------------------------------------------------------------------------


def test_the_oldest_of_too_many_strangers_is_cut_off(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "MAX_STRANGERS", 2)
    with RawPeer(broker.address) as first, RawPeer(broker.address), RawPeer(broker.address):
        assert first.ended()
        assert len(connections(broker)) == 2


def test_too_many_connections_cost_the_member_that_has_the_most(
    broker: Broker, setting: Setting, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module, "MAX_CONNECTIONS", 3)
    with raw(broker, setting, "device-1") as first, raw(broker, setting, "device-1") as second:
        for number, peer in enumerate((first, second), 1):
            peer.send_header(announcement("device-1"))
            wait_until(lambda: len(broker._peers) == number)  # noqa: B023
        join("device-2")
        join("worker-1")
        assert second.ended()
        assert sorted(one.member for one in connections(broker) if one.member) == [
            "device-1",
            "device-2",
            "worker-1",
        ]


def test_a_connection_without_a_member_ends(broker: Broker, join: Join) -> None:
    device, other = join("device-1"), join("device-2")
    device.announce(leaving=True)
    wait_until(lambda: device.id not in broker._peers)
    [connection] = [one for one in connections(broker) if not one.member]
    connection.until = 0.0
    wait_until(lambda: broker.counters["connections_idle"] == 1)
    other.join()
    device.join()


def test_a_revoked_members_connection_ends(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Setting(tmp_path, setting.checkpoint)
    with own.broker() as broker, raw(broker, own, "device-1") as peer:
        peer.send_header(announcement("device-1"))
        wait_until(lambda: broker._peers)
        own.fleet.revoke("device-1")
        assert peer.ended()
        assert not broker._peers


# --- the memory of the process -----------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tcp", "ipc"])
def test_a_broker_keeps_below_its_memory_limit(over: str, tmp_path: Path) -> None:
    """Many messages without an end, each of which could be an honest one: only all of them are too much."""
    tmp_path.chmod(0o700)
    address = "tcp://127.0.0.1:*" if over == "tcp" else f"ipc://{tmp_path}/broker"
    limit, frame, count = 160 << 20, bytes(1 << 20), 16
    fleet = load_fleet()
    identity = fleet.identity("device")
    member = identity.certificate.name
    with running_command(["broker", "--bind", address, "--memory-limit", str(limit)]) as (process, facts):
        cut_off = 0
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(RawPeer(facts["address"], fleet, identity)) for _ in range(count)]
            for peer in peers:
                peer.send_header(announcement(member))
            for peer in [peer for _ in range(UNFINISHED_BYTES >> 20) for peer in peers]:
                try:
                    peer.send(frame, more=True)
                except ConnectionError:
                    cut_off += 1
        assert cut_off
        with FakePeer(facts["address"], fleet, identity) as device:
            device.join()
        wait_until(lambda: psutil.Process(process.pid).memory_info().rss < limit)


def test_frames_are_made_as_zmtp_wants_them() -> None:
    assert zmtp_frame(b"x" * 255)[:2] == b"\x00\xff"
    assert zmtp_frame(b"x" * 256, 1)[:9] == b"\x03" + (256).to_bytes(8)
