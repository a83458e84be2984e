"""The broker, seen by peers that say what they like: whom it lets in, what it routes, and what it keeps."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from split_broker import broker as broker_module
from split_broker import opens as opens_module
from split_broker.broker import GRACE, Broker
from split_broker.peer_queue import QUEUE_MESSAGES, PeerQueue
from split_broker.under_way import WINDOW
from split_common.errors import BrokerUnreachable, ConfigError, KeysError, Oversized
from split_common.protocol import headers
from split_common.transport import HEARTBEAT, connect, new_peer_id, parse_address, peer_name
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.zmq_link import ZmqLink
from split_common.trust.keys import Identity
from wiretap import LATE, FakePeer, Setting, on_loop, wait_until

SERVICE = headers.Service(b"r" * 32, 2, 4)

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))
    setting.fleet.add_member("device", "device-2")
    setting.fleet.add_member("worker", "worker-2")
    return setting


@pytest.fixture
def join(setting: Setting, broker: Broker) -> Iterator[object]:
    peers: list[FakePeer] = []

    def make(member: str, id_: bytes | None = None, **fields: object) -> FakePeer:
        peer = FakePeer(broker.address, setting.fleet, setting.fleet.read_identity(member), id_)
        peers.append(peer)
        if peer.role == "worker":
            fields = {"service": SERVICE, "model": "tiny", "room": 3, **fields}
        peer.join(**fields)
        return peer

    yield make
    for peer in peers:
        peer.socket.close()


def relay(sender: FakePeer, to: FakePeer, **fields: object) -> headers.Relay:
    kind = headers.RelayKind.REQUEST if sender.role == "device" else headers.RelayKind.REPLY
    return headers.Relay(**{"to": to.id, "sender": sender.id, "kind": kind, "channel": 1, "session": 1, **fields})  # type: ignore[arg-type]


# --- routing -----------------------------------------------------------------------------------------------


def test_messages_go_to_whom_they_are_for_and_no_farther(join, broker) -> None:
    device, worker, other = join("device-1"), join("worker-1"), join("worker-2")
    device.send(relay(device, worker, seq=7), b"sealed")
    header, body = worker.receive(headers.Relay)
    assert (header, body) == (relay(device, worker, seq=7), b"sealed")
    worker.send(relay(worker, device, seq=7), b"answer")
    assert device.receive(headers.Relay)[1] == b"answer"
    assert other.silent(headers.Relay)


def test_a_sender_must_be_the_connections_own_peer(join, broker) -> None:
    device, worker, other = join("device-1"), join("worker-1"), join("device-2")
    other.send(relay(device, worker))
    other.send(headers.Open(device.id, 1, SERVICE))
    other.send(headers.RosterRequest(device.id))
    wait_until(lambda: broker.counters["unannounced"] == 3)
    assert worker.silent(headers.Relay | headers.Open)
    assert device.silent(headers.RosterReply)


def test_peers_of_one_role_cannot_write_to_each_other(join, broker) -> None:
    one, other = join("device-1"), join("device-2")
    one.send(relay(one, other))
    worker, colleague = join("worker-1"), join("worker-2")
    worker.send(relay(worker, colleague))
    worker.send(headers.Open(worker.id, 1, SERVICE))
    wait_until(lambda: broker.counters["Malformed"] == 3)
    assert other.silent(headers.Relay)


def test_no_peer_announces_itself_as_another(join, setting: Setting, broker) -> None:
    device, worker = join("device-1"), join("worker-1")
    impostor = FakePeer(broker.address, setting.fleet, setting.fleet.read_identity("device-2"))
    with impostor:
        impostor.announce(member="device-1")
        impostor.announce(role="worker", service=SERVICE)
        impostor.announce(member="worker-1", role="worker")
        impostor.announce(sender=device.id)
        impostor.announce(sender=worker.id)
        impostor.announce(sender=worker.id, leaving=True)
        impostor.announce(sender=new_peer_id("device-1"))
        wait_until(lambda: broker.counters["Malformed"] == 7)
        impostor.join()
        impostor.announce(sender=new_peer_id("device-2"))
        wait_until(lambda: broker.counters["Malformed"] == 8)
    assert {id_ for id_, peer in broker._peers.items() if peer.member != "device-2"} == {device.id, worker.id}
    device.send(relay(device, worker))
    worker.receive(headers.Relay)


def test_a_device_that_offers_a_service_is_given_no_opens(join, broker) -> None:
    device, liar = join("device-1"), join("device-2", service=SERVICE, model="bait", room=10_000)
    device.send(headers.Open(device.id, 1, SERVICE))
    bounce = device.receive(headers.Bounce)[0]
    assert bounce.reason == "no-worker"
    assert "bait" not in bounce.detail
    assert liar.silent(headers.Open)


def test_what_is_for_nobody_comes_back_as_gone(join, broker) -> None:
    device = join("device-1")
    nobody = SimpleNamespace(id=bytes(8))
    device.send(relay(device, nobody, seq=5))
    bounce = device.receive(headers.Bounce)[0]
    assert (bounce.reason, bounce.session, bounce.seq, bounce.peer) == ("gone", 1, 5, bytes(8))


def test_a_new_broker_says_full_not_gone_until_it_knows_who_lives(join, broker) -> None:
    device = join("device-1", watching=[bytes(8)])
    broker._started += 600
    device.send(relay(device, SimpleNamespace(id=bytes(8))))
    bounce = device.receive(headers.Bounce)[0]
    assert bounce.reason == "full"
    assert 0 < bounce.retry_after < GRACE
    assert device.join(watching=[bytes(8)]).gone == []
    broker._started -= 600
    assert device.join(watching=[bytes(8)]).gone == [bytes(8)]


# --- opens -------------------------------------------------------------------------------------------------


def test_the_worker_with_the_most_room_is_given_an_open(join) -> None:
    device, small, large = join("device-1"), join("worker-1", room=1), join("worker-2", room=2)
    for channel in (1, 2, 3):
        device.send(headers.Open(device.id, channel, SERVICE), b"hello")
    received = [large.receive(headers.Open)[0].channel, large.receive(headers.Open)[0].channel]
    received.append(small.receive(headers.Open)[0].channel)
    assert sorted(received) == [1, 2, 3]


def test_an_open_waits_for_room_and_a_device_has_one_at_a_time(
    join, broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens_module, "OPEN_PATIENCE", 600.0)
    device, worker = join("device-1"), join("worker-1", room=0)
    for channel in range(50):
        device.send(headers.Open(device.id, channel, SERVICE))
    wait_until(lambda: [pending.header.channel for pending in list(broker._opens.pending.values())] == [49])
    assert worker.silent(headers.Open)
    worker.announce(service=SERVICE, room=5)
    assert worker.receive(headers.Open)[0].channel == 49
    assert worker.silent(headers.Open)
    wait_until(lambda: not broker._opens.pending)


def test_an_open_that_cannot_be_met_is_answered(join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opens_module, "OPEN_PATIENCE", 0.3)
    device, worker = join("device-1"), join("worker-1", room=0)
    device.send(headers.Open(device.id, 1, SERVICE))
    full = device.receive(headers.Bounce)[0]
    assert (full.reason, full.channel) == ("busy", 1)
    assert full.retry_after > 0
    # What waiting does not help is answered without.
    monkeypatch.setattr(opens_module, "OPEN_PATIENCE", 600.0)
    worker.announce(service=SERVICE, room=5, model="tiny")
    device.send(headers.Open(device.id, 2, SERVICE, [worker.id]))
    assert device.receive(headers.Bounce)[0].reason == "busy"
    device.send(headers.Open(device.id, 3, headers.Service(b"x" * 32, 2, 4)))
    wrong = device.receive(headers.Bounce)[0]
    assert wrong.reason == "no-worker"
    assert wrong.detail == f"tiny 2:4 ({peer_name('worker-1', worker.id)})"


def test_opens_for_services_that_nobody_has_leave_nothing_behind(join, broker) -> None:
    device = join("device-1")
    for number in range(200):
        device.send(headers.Open(device.id, number, headers.Service(secrets.token_bytes(32), 0, 1)))
    wait_until(lambda: broker.counters["bounced_no-worker"] >= 1)
    wait_until(lambda: not broker._opens.pending)
    device.send(headers.Open(device.id, 999, SERVICE))
    device.announce(leaving=True)
    wait_until(lambda: not (broker._peers or broker._opens.pending or broker._routes))


# --- life and death ----------------------------------------------------------------------------------------


def test_a_workers_closed_connection_is_seen_at_once(join, broker) -> None:
    worker = join("worker-1")
    device = join("device-1", watching=[worker.id])
    worker.socket.close()
    # By its silence it would not be seen for minutes.
    assert device.receive(headers.Welcome)[0].gone == [worker.id]


def test_a_workers_death_is_seen_though_its_queue_waits_for_credit(join, broker) -> None:
    worker = join("worker-1")
    device = join("device-1", watching=[worker.id])
    broker._peers[worker.id].queue.under_way.sent = 2 * WINDOW
    device.send(relay(device, worker), b"waits")
    wait_until(lambda: len(broker._peers[worker.id].queue))
    worker.socket.close()
    assert device.receive(headers.Welcome)[0].gone == [worker.id]


def test_a_silent_peer_is_gone_after_three_heartbeats(join, broker) -> None:
    worker = join("worker-1")
    device = join("device-1", watching=[worker.id])
    silence = HEARTBEAT * broker_module.MISSED
    now = broker._peers[worker.id].seen + silence
    on_loop(broker, lambda: broker._housekeeping(now - 1e-6))
    assert set(broker._peers) == {worker.id, device.id}
    on_loop(broker, lambda: broker._housekeeping(now + 1e-6))
    assert device.receive(headers.Welcome)[0].gone == [worker.id]
    assert set(broker._peers) == {device.id}


def test_no_peer_is_taken_for_dead_because_the_broker_was_held_up(join, broker, monkeypatch) -> None:
    worker = join("worker-1")
    device = join("device-1", watching=[worker.id])
    held_up = 2 * HEARTBEAT * broker_module.MISSED
    monkeypatch.setattr(broker_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + held_up))
    for _ in range(2):
        on_loop(broker, lambda: None)
    assert set(broker._peers) == {worker.id, device.id}
    assert device.silent(headers.Welcome)


def test_a_peer_that_was_taken_for_dead_learns_that_nobody_waits_for_it(join, broker) -> None:
    """Those that it watches were told that it is gone; each side then holds nothing of the other."""
    worker = join("worker-1")
    device = join("device-1", watching=[worker.id])
    broker._peers[worker.id].seen -= 1000
    assert device.receive(headers.Welcome)[0].gone == [worker.id]
    assert worker.join(service=SERVICE, watching=[device.id]).gone == [device.id]
    assert worker.join(service=SERVICE, watching=[device.id]).gone == []


def test_many_deaths_at_once_are_survived(join, broker) -> None:
    """Each of them watches all others: telling one of another's death finds the next one dead."""
    devices = [join("device-1") for _ in range(5)]
    workers = [join("worker-1") for _ in range(5)]
    everyone = [peer.id for peer in devices + workers]
    for peer in devices:
        peer.announce(watching=everyone)
    for peer in workers:
        peer.announce(watching=everyone, service=SERVICE)
    wait_until(lambda: all(peer.watching for peer in broker._peers.values()))
    for peer in devices + workers:
        peer.socket.close()
    for known in list(broker._peers.values()):
        known.seen -= 1000
    wait_until(lambda: (broker.counters["workers_gone"], broker.counters["devices_gone"]) == (5, 5))
    assert not broker._peers
    assert broker.counters["failures"] == 0
    join("device-1")


def test_a_device_that_comes_back_on_a_new_connection_gets_what_was_kept(setting: Setting, join, broker) -> None:
    worker, device = join("worker-1"), join("device-1")
    peer = broker._peers[device.id]
    device.socket.close()
    reached = [True]
    while reached[-1]:
        # Until the broker's socket knows that nobody is there.
        on_loop(
            broker,
            lambda: reached.append(broker._delivery.send(peer, (headers.encode_header(headers.Probe()), b""))),
        )
    for number in range(3):
        worker.send(relay(worker, device, seq=number))
    wait_until(lambda: len(peer.queue) == 3)
    with FakePeer(broker.address, setting.fleet, setting.fleet.read_identity("device-1"), device.id) as back:
        back.announce()
        assert [back.receive(headers.Relay)[0].seq for _ in range(3)] == [0, 1, 2]


def test_revoked_members_are_put_out_while_the_broker_runs(tmp_path: Path, setting: Setting) -> None:
    own = Setting(tmp_path, setting.checkpoint)
    with own.broker() as broker:
        broker._started -= GRACE
        with (
            FakePeer(broker.address, own.fleet, own.fleet.read_identity("device-1")) as device,
            FakePeer(broker.address, own.fleet, own.fleet.read_identity("worker-1")) as worker,
        ):
            worker.join(service=SERVICE)
            device.join(watching=[worker.id])
            own.fleet.revoke("worker-1")
            wait_until(lambda: worker.id not in broker._peers)
            gone = [device.receive(headers.Welcome)[0] for _ in range(2)]
            assert [worker.id] in [welcome.gone for welcome in gone]
            assert {welcome.roster_version for welcome in gone} == {2}
            worker.announce(service=SERVICE)
            worker.send(relay(worker, device))
            wait_until(lambda: broker.counters["unannounced"] == 1)
            assert broker.counters["Malformed"] == 1
            # A new connection is refused at the door.
            late = FakePeer(broker.address, own.fleet, own.fleet.read_identity("worker-1"))
            with late:
                late.announce(service=SERVICE)
                wait_until(lambda: broker.counters["AuthenticationError"] >= 1)
                assert late.silent(headers.Header)


# --- bounds ------------------------------------------------------------------------------------------------


def test_a_queue_is_bounded_in_bytes_and_messages() -> None:
    queue = PeerQueue()
    piece = b"", bytes(headers.MAX_BODY)
    assert [queue.put(piece) for _ in range(QUEUE_BYTES // headers.MAX_BODY + 1)] == [True] * (
        QUEUE_BYTES // headers.MAX_BODY
    ) + [False]
    small = PeerQueue()
    assert all(small.put((b"", b"")) for _ in range(QUEUE_MESSAGES))
    assert not small.put((b"", b""))


def test_a_queue_stops_at_its_credit_and_a_peer_cannot_lend_itself_more() -> None:
    queue = PeerQueue()
    for _ in range(12):
        queue.put((b"", bytes(headers.MAX_BODY)))
    queue.credit(1000)
    sent = 0
    while queue.take() is not None:
        sent += 1
    assert sent * headers.MAX_BODY == WINDOW + headers.MAX_BODY
    queue.credit(1000 + 2**60)
    before = queue.under_way.sent
    while queue.take() is not None:
        pass
    assert queue.under_way.sent - before <= WINDOW + headers.MAX_BODY
    queue.credit(1000 + queue.under_way.sent)
    assert queue.under_way.sent == queue.under_way.received
    # Bytes that the kernel still has, or that it never got, are not on the peer's side, whatever the peer says.
    queue.credit(2**60, unsent=2 * WINDOW)
    queue.put((b"", b"x"))
    assert queue.take() is None


def test_a_slow_reader_does_not_hold_up_others_and_gets_all_in_order(join, broker) -> None:
    slow, worker, device = join("device-2"), join("worker-1"), join("device-1")
    count = 1500
    for number in range(count):
        worker.send(relay(worker, slow, seq=number), bytes(20_000))
    worker.send(relay(worker, device))
    device.receive(headers.Relay)
    assert [slow.receive(headers.Relay)[0].seq for _ in range(count)] == list(range(count))


def test_a_full_queue_is_told_to_the_sender(join, broker, monkeypatch: pytest.MonkeyPatch) -> None:
    device, worker = join("device-1"), join("worker-1")
    queue = broker._peers[worker.id].queue
    queue.under_way.sent = 2 * WINDOW
    queue._bytes.add("device-1", QUEUE_BYTES)
    device.send(relay(device, worker, seq=3), b"x")
    bounce = device.receive(headers.Bounce)[0]
    assert (bounce.reason, bounce.seq) == ("full", 3)


# --- bytes that are no messages ------------------------------------------------------------------------------


def test_garbage_is_counted_and_the_broker_goes_on(join, broker) -> None:
    device, worker = join("device-1"), join("worker-1")
    deep = msgspec.msgpack.encode(msgspec.structs.astuple(SERVICE))
    nested = b"\x01\x94\x06\xc4\x08" + bytes(8) + b"\x01" + bytes((deep[0] + 1,)) + deep[1:] + b"\x91" * 50_000
    for frames in (
        [b""],
        [b"", b""],
        [b"\x03rest", b""],
        [bytes(headers.MAX_HEADER + 1), b""],
        [nested, b""],
        [headers.encode_header(relay(device, worker)), b"", b"third"],
        [headers.encode_header(relay(device, worker)), bytes(headers.MAX_BODY + 1)],
        [headers.encode_header(headers.Welcome(bytes(8))), b""],
        [headers.encode_header(headers.RosterReply()), b""],
    ):
        device.socket.send_multipart(frames)
    wait_until(lambda: sum(broker.counters[name] for name in ("Malformed", "Oversized", "VersionMismatch")) == 9)
    assert (broker.counters["Oversized"], broker.counters["VersionMismatch"]) == (2, 1)
    assert broker.counters["failures"] == 0
    device.send(relay(device, worker))
    assert worker.receive(headers.Relay)[0] == relay(device, worker)


@pytest.fixture(scope="module")
def offline(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker whose loop does not run, with one device and one worker; it is handed its messages."""
    directory = tmp_path_factory.mktemp("ipc")
    directory.chmod(0o700)
    broker = Broker(f"ipc://{directory}/b", setting.own_fleet())
    broker._started -= GRACE
    for id_, route, role in ((b"device-1", b"r1", "device"), (b"worker-1", b"r2", "worker")):
        service = SERVICE if role == "worker" else None
        broker._announced(headers.Announce(id_, role, id_.decode(), service=service, room=1), route, id_.decode())
    yield broker
    broker.stop()


@given(st.data())
@settings(max_examples=1500, deadline=None)
def test_no_frame_makes_the_broker_fail(offline: Broker, data: st.DataObject) -> None:
    valid = data.draw(
        st.sampled_from(
            [
                headers.Announce(b"device-1", "device", "device-1", watching=[b"worker-1"]),
                headers.Relay(b"worker-1", b"device-1", headers.RelayKind.REQUEST, 1, 2, 0, 3, 4),
                headers.Open(b"device-1", 1, SERVICE, [bytes(8)]),
                headers.RosterRequest(b"device-1"),
                headers.Bounce("gone"),
            ]
        )
    )
    frame = bytearray(headers.encode_header(valid))
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(1, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(1, len(frame))) :]
    envelope = SimpleNamespace(bytes=data.draw(st.sampled_from([b"r1", b"r2", b"r3"])))
    before = sum(offline.counters.values())
    offline._supervisor.run(offline._take, [envelope, SimpleNamespace(bytes=bytes(frame)), b"body"])  # type: ignore[list-item]
    assert offline.counters["failures"] == 0
    assert len(offline._peers) <= 3 >= len(offline._routes)
    assert len(offline._opens.pending) <= 3
    assert sum(offline.counters.values()) >= before


def test_a_member_that_comes_and_goes_fills_no_log(offline: Broker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "split_broker"):
        for name in ["hog"] * 1000 + ["other"]:
            peer = offline._delivery.add(headers.Announce(b"p", "device", name), b"r9", name)
            offline._delivery.remove(peer, "has left")
    assert 2 < len(caplog.messages) < 1000
    assert [message.split("/")[0] for message in caplog.messages[-2:]] == ["device other"] * 2


def test_ten_thousand_frames_of_all_kinds_leave_nothing_behind(offline: Broker) -> None:
    choose = random.Random(0)
    good = [
        headers.encode_header(header)
        for header in (
            headers.Announce(b"device-1", "device", "device-1", watching=[b"worker-1"]),
            headers.Announce(b"device-2", "device", "device-1"),
            headers.Relay(b"worker-1", b"device-1", headers.RelayKind.REQUEST, 1, 2, 0, 3, 4),
            headers.Relay(b"device-1", b"worker-1", headers.RelayKind.REPLY, 1, 2, 0, 3, 4),
            headers.Open(b"device-1", 1, SERVICE, [bytes(8)]),
            headers.Open(b"device-9", 1, headers.Service(bytes(32), 1, 2)),
            headers.RosterRequest(b"device-1"),
            headers.RosterReply(),
            headers.Welcome(bytes(8), 9, [b"worker-1"]),
        )
    ]
    offline.counters.clear()
    for _ in range(10_000):
        frame = bytearray(choose.choice(good))
        match choose.randrange(4):
            case 0:
                frame[choose.randrange(len(frame))] ^= 1 << choose.randrange(8)
            case 1:
                del frame[choose.randrange(len(frame)) :]
            case 2:
                frame += choose.choice(good)[: choose.randrange(20)]
        envelope = SimpleNamespace(bytes=choose.choice([b"r1", b"r2", b"r3"]))
        head, body = SimpleNamespace(bytes=bytes(frame)), choose.randbytes(choose.randrange(50))
        offline._supervisor.run(offline._take, [envelope, head, body])  # type: ignore[list-item]
    assert offline.counters["failures"] == 0
    assert offline.counters["Malformed"] > 3000
    assert offline.counters["VersionMismatch"] > 10
    assert len(offline._peers) <= 3 >= len(offline._routes)
    assert len(offline._opens.pending) <= 3


def test_an_unforeseen_failure_does_not_end_the_loop(join, broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    device, worker = join("device-1"), join("worker-1")
    with monkeypatch.context() as patch:
        patch.setattr(broker, "_relay", fail)
        device.send(relay(device, worker))
        wait_until(lambda: broker.counters["failures"] == 1)
    device.send(relay(device, worker))
    worker.receive(headers.Relay)


# --- the door ----------------------------------------------------------------------------------------------


def test_only_keys_of_the_roster_get_in(tmp_path: Path, setting: Setting, broker) -> None:
    stranger = Setting(tmp_path, setting.checkpoint).fleet.read_identity("device-1")
    # It knows the broker's key and claims a member's name; its own key is not in the roster.
    with FakePeer(broker.address, setting.fleet, stranger) as peer:
        peer.announce()
        wait_until(lambda: broker.counters["AuthenticationError"] >= 1)
        assert peer.silent(headers.Header)
    # Without CURVE there is no way in either.
    plain = zmq.Context.instance().socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(broker.address)
    plain.sndtimeo = 300
    with contextlib.suppress(zmq.Again):
        plain.send_multipart([headers.encode_header(headers.Announce(bytes(8), "device", "device-1")), b""])
    assert not plain.poll(300)
    plain.close()
    assert not broker._peers


def test_what_comes_before_an_announcement_is_its_members(
    setting: Setting, broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = []
    owner = broker._authentication.owner
    monkeypatch.setattr(
        broker._authentication, "owner", lambda envelope: (owners.append(owner(envelope)), owners[-1])[1]
    )
    with FakePeer(broker.address, setting.fleet, setting.fleet.read_identity("device-1")) as early:
        early.send(headers.RosterRequest(early.id))
        early.receive(headers.Welcome)
    assert owners == ["device-1"]


def test_an_unknown_device_is_told_so_in_time(tmp_path: Path, setting: Setting, broker) -> None:
    stranger: Identity = Setting(tmp_path, setting.checkpoint).fleet.read_identity("device-1")
    link = connect(broker.address, setting.own_fleet(), stranger)
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match=r"something listens there: .* in its roster"):
        link.start(SimpleNamespace(announcement=lambda: headers.Announce(bytes(8), "device", "device-1")), 1.0)  # type: ignore[arg-type]
    assert time.monotonic() - began < 1.0 + LATE


def test_a_broker_that_is_not_there_is_told_so_in_time(setting: Setting, tmp_path: Path) -> None:
    for address in ("tcp://127.0.0.1:9", f"ipc://{tmp_path}/nobody"):
        began = time.monotonic()
        with (
            pytest.raises(BrokerUnreachable, match="nothing can be reached there"),
            setting.client(address, timeout=0.5),
        ):
            pass
        assert time.monotonic() - began < 0.5 + LATE
    assert not [thread for thread in threading.enumerate() if thread.name == "lambda-split-link"]


def test_a_client_talks_to_its_own_fleets_broker_alone(tmp_path: Path, setting: Setting) -> None:
    other = Setting(tmp_path, setting.checkpoint)
    with other.broker() as broker, pytest.raises(BrokerUnreachable), setting.client(broker.address, timeout=0.7):
        pass


def test_a_roster_without_a_broker_is_a_clear_error(tmp_path: Path, setting: Setting) -> None:
    own = Setting(tmp_path, setting.checkpoint)
    own.fleet.revoke("broker")
    with pytest.raises(KeysError, match="lists no broker"), own.client("tcp://127.0.0.1:9", timeout=5):
        pass


def test_addresses() -> None:
    assert parse_address("zmq://h:1") == parse_address("tcp://h:1") == "tcp://h:1"
    assert parse_address("ipc:///run/x") == "ipc:///run/x"
    assert parse_address("ipc://~/x") == f"ipc://{Path.home()}/x"
    assert parse_address("tcp://[::1]:7411") == "tcp://[::1]:7411"
    for wrong in (
        "tcp://h",
        "tcp://:1",
        "tcp://h:0",
        "tcp://h:70000",
        "tcp://h:²",
        "h:1",
        "ipc://",
        "udp://h:1",
        "",
    ):
        with pytest.raises(ConfigError):
            parse_address(wrong)
    for unguarded in ("ipc://@abstract", "ipc://*"):
        with pytest.raises(ConfigError):
            parse_address(unguarded)


def test_one_address_is_for_one_broker(setting: Setting, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for address in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/b"):
        with setting.broker(address) as first, pytest.raises(ConfigError, match="cannot listen"):
            Broker(first.address, setting.own_fleet())
    assert list(tmp_path.iterdir()) == []


def test_an_ipc_socket_needs_a_directory_of_ones_own(setting: Setting, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        Broker(f"ipc://{tmp_path}/b", setting.own_fleet())
    with pytest.raises(ConfigError):
        Broker(f"ipc://{tmp_path}/{'x' * 200}", setting.own_fleet())
    with pytest.raises(ConfigError, match="new: No such file or directory"):
        Broker(f"ipc://{tmp_path}/new/b", setting.own_fleet())
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a directory"):
        Broker(f"ipc://{tmp_path}/file/b", setting.own_fleet())
    tmp_path.chmod(0o700)
    with setting.broker(f"ipc://{tmp_path}/b"):
        assert (tmp_path / "b").is_socket()


def test_keys_made_for_this_machine_do_not_listen_to_others() -> None:
    from split_common.trust.fleet import load_fleet

    with pytest.raises(ConfigError, match="no keys are configured"):
        Broker("tcp://0.0.0.0:*", load_fleet())


def test_stopping_is_prompt_and_leaves_no_thread(setting: Setting) -> None:
    before = set(threading.enumerate())
    took: list[float] = []
    for start in (True, False, True, False):
        broker = Broker("tcp://127.0.0.1:*", setting.own_fleet())
        if start:
            broker.start()
        began = time.monotonic()
        broker.stop()
        took.append(time.monotonic() - began)
    # A busy machine may be late, but not each time.
    assert min(took[::2]) < 1.0 > min(took[1::2])
    assert set(threading.enumerate()) <= before


# --- the link ----------------------------------------------------------------------------------------------


def test_a_body_too_large_to_travel_is_refused_by_the_sender(setting: Setting) -> None:
    link = ZmqLink("tcp://127.0.0.1:9", setting.own_fleet(), setting.fleet.read_identity("device-1"))
    with pytest.raises(Oversized):
        link.send(headers.RosterRequest(bytes(8)), bytes(headers.MAX_BODY + 1))
    link.close()


def test_the_largest_body_travels_over_curve(join) -> None:
    device, worker = join("device-1"), join("worker-1")
    device.send(relay(device, worker), bytes(headers.MAX_BODY))
    assert len(worker.receive(headers.Relay)[1]) == headers.MAX_BODY


def test_a_link_survives_garbage_and_a_failing_handler(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hostile broker may send: each is counted, and heartbeats go on."""
    with setting.broker() as broker, setting.client(broker.address) as client:
        link = client.transport
        (peer,) = broker._peers.values()
        fail = lambda *_: 1 / 0  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(client, "on_message", fail)
            on_loop(
                broker, lambda: broker._delivery.put(peer, (headers.encode_header(headers.Bounce("full")), b""))
            )
            wait_until(lambda: link.counters["HandlerError"] == 1)
        announce = headers.encode_header(headers.Announce(bytes(8), "device", "x"))
        forged = headers.encode_header(headers.RosterReply())
        messages = [(b"", b""), (b"\x07", b""), (forged, b"forged"), (announce, b"")]
        on_loop(broker, lambda: [broker._delivery.put(peer, message) for message in messages])
        wait_until(lambda: link.counters["Malformed"] == 2)
        assert link.counters["VersionMismatch"] == link.counters["CertificateError"] == 1
        seen = peer.seen
        wait_until(lambda: peer.seen > seen and link.alive)


def test_a_link_bounds_what_it_has_not_sent(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_common.transport.zmq_link.OUTBOX_BYTES", 1_000_000)
    with setting.broker() as broker, setting.client(broker.address, timeout=5) as client:
        broker.stop()

        def is_full() -> bool:
            client.transport.send(headers.Relay(bytes(8), client.id, headers.RelayKind.REQUEST, 1), bytes(100_000))
            return client.transport.counters["outbox_full"] >= 20

        wait_until(is_full)
        assert client.transport._unsent_bytes <= 1_000_000
