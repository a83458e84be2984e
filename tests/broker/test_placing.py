"""Which workers the broker gives devices' opens to, whatever these say of themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

import tiny
from split_broker import opens as opens_module
from split_broker.broker import Broker
from split_common.protocol import headers
from split_common.protocol.headers import RelayKind
from split_common.transport.base import OPEN_PATIENCE
from split_common.transport.placement import ANSWER_PATIENCE
from split_common.trust import keys as keys_module
from split_common.trust.keys import ModelScope
from wiretap import FakePeer, Setting, on_loop, wait_until

SERVICE = headers.Service(b"r" * 32, 2, 4)

Join = Callable[..., FakePeer]

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))
    setting.fleet.add_member("device", "device-2")
    setting.fleet.add_member("worker", "worker-2")
    setting.fleet.add_member("worker", "brief", days=1)
    setting.fleet.add_member("device", "brief-device", days=1)
    setting.fleet.add_member("worker", "fit", [ModelScope(SERVICE.root, 0, 9)])
    setting.fleet.add_member("worker", "unfit", [ModelScope(SERVICE.root, 0, 3)])
    return setting


@pytest.fixture
def make(setting: Setting, broker: Broker) -> Iterator[Join]:
    """Connects a peer, which says nothing yet."""
    peers: list[FakePeer] = []

    def connect(member: str) -> FakePeer:
        peers.append(FakePeer(broker.address, setting.fleet, setting.fleet.read_identity(member)))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.socket.close()


@pytest.fixture
def join(make: Join) -> Join:
    def join(member: str, certificate: bytes | None = None, **fields: object) -> FakePeer:
        peer = make(member)
        peer.certificate = peer.certificate if certificate is None else certificate
        if peer.role == "worker":
            fields = {"service": SERVICE, "model": "tiny", "room": 3, **fields}
        peer.join(**fields)
        return peer

    return join


def days_pass(days: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the clock by which certificates are judged."""
    monkeypatch.setattr(keys_module, "time", SimpleNamespace(time=lambda: time.time() + 86_400 * days))


# --- certificates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["junk", "other", "role", "unfit", "long"])
def test_a_worker_whose_certificate_does_not_hold_is_not_let_in(
    wrong: str, setting: Setting, make: Join, join: Join, broker: Broker
) -> None:
    device, worker = join("device-1"), make("unfit")
    certificates = {
        "junk": b"junk",
        "other": setting.fleet.read_identity("worker-1").certificate_bytes,
        "role": setting.fleet.read_identity("device-2").certificate_bytes,
        "unfit": worker.certificate,
        "long": bytes(65 * 1024),
    }
    worker.certificate = certificates[wrong]
    worker.announce(service=SERVICE, model="bait", room=9)
    wait_until(lambda: broker.counters["CertificateError"] == 1)
    assert set(broker._peers) == {device.id}
    device.send(headers.Open(device.id, 1, SERVICE))
    bounce = device.receive(headers.Bounce)[0]
    assert bounce.reason == "no-worker"
    assert bounce.detail.startswith("none; not let in: ")
    # Where it is not missed, nothing is said of it.
    device.send(headers.Open(device.id, 2, headers.Service(bytes(32), 2, 4)))
    assert device.receive(headers.Bounce)[0].detail == "none"


def test_a_certificate_that_covers_more_will_do(join: Join, broker: Broker) -> None:
    device, worker = join("device-1"), join("fit")
    device.send(headers.Open(device.id, 1, SERVICE))
    assert worker.receive(headers.Open)[0].channel == 1


def test_a_service_without_layers_is_malformed(make: Join, broker: Broker) -> None:
    worker = make("worker-1")
    worker.announce(service=headers.Service(bytes(32), 4, 4))
    wait_until(lambda: broker.counters["Malformed"] == 1)
    assert not broker._peers


@pytest.mark.parametrize("member", ["brief", "brief-device"])
def test_a_member_whose_certificate_runs_out_is_put_out(
    member: str, make: Join, join: Join, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = join(member)
    watcher = join("device-1" if member == "brief" else "worker-1", watching=[peer.id])
    days_pass(1, monkeypatch)
    peer.announce(service=SERVICE if member == "brief" else None)
    assert watcher.receive(headers.Welcome)[0].gone == [peer.id]
    again = make(member)
    again.announce()
    wait_until(lambda: broker.counters["CertificateError"] == 2)
    assert set(broker._peers) == {watcher.id}


def test_a_wrong_certificate_puts_nobody_else_out(join: Join, make: Join, broker: Broker) -> None:
    worker, liar = join("worker-1"), make("worker-1")
    liar.id, liar.certificate = worker.id, b"junk"
    liar.announce(service=SERVICE)
    wait_until(lambda: broker.counters["CertificateError"] == 1)
    assert set(broker._peers) == {worker.id}


def test_workers_that_show_no_certificate_come_last(join: Join) -> None:
    """Older workers have none to show; so may one whose certificate does not hold."""
    device, old, new = join("device-1"), join("worker-1", b"", room=10_000), join("worker-2", room=2)
    for channel in range(3):
        device.send(headers.Open(device.id, channel, SERVICE))
    assert [new.receive(headers.Open)[0].channel for _ in range(2)] == [0, 1]
    assert old.receive(headers.Open)[0].channel == 2


# --- silence -----------------------------------------------------------------------------------------------


def test_an_open_that_is_repeated_goes_to_another_worker(join: Join, broker: Broker) -> None:
    device, silent, good = join("device-1"), join("worker-1", room=2**61), join("worker-2", room=1)
    device.send(headers.Open(device.id, 1, SERVICE), b"hello")
    assert silent.receive(headers.Open)[1] == b"hello"
    device.send(headers.Open(device.id, 1, SERVICE), b"hello")
    assert good.receive(headers.Open)[1] == b"hello"
    # Nor do this device's next ones go there, of this process or another; other devices' do.
    good.join(service=SERVICE, room=9)
    for peer, channel in ((device, 2), (join("device-1"), 3)):
        peer.send(headers.Open(peer.id, channel, SERVICE))
        assert good.receive(headers.Open)[0].channel == channel
    other = join("device-2")
    other.send(headers.Open(other.id, 4, SERVICE))
    assert silent.receive(headers.Open)[0].channel == 4


def test_a_worker_that_does_not_end_set_ups_is_passed_over_and_comes_back(join: Join, broker: Broker) -> None:
    device, slow, other = join("device-1"), join("worker-1", room=9), join("worker-2", room=1)

    def open_channel(number: int, worker: FakePeer) -> None:
        device.send(headers.Open(device.id, number, SERVICE))
        assert worker.receive(headers.Open)[0].channel == number

    def relay(kind: RelayKind, number: int) -> None:
        device.send(headers.Relay(slow.id, device.id, kind, number))
        assert slow.receive(headers.Relay)[0].kind == kind

    open_channel(1, slow)
    # What the worker itself says of it is not asked.
    slow.send(headers.Relay(device.id, slow.id, RelayKind.ANSWER, 1))
    relay(RelayKind.FINISH, 1)
    relay(RelayKind.FINISH, 1)
    open_channel(2, other)
    # The answer came late, but it came: the channel is used.
    device.send(headers.Open(device.id, 3, SERVICE, [other.id]))
    assert slow.receive(headers.Open)[0].channel == 3
    relay(RelayKind.FINISH, 3)
    relay(RelayKind.REQUEST, 3)
    other.join(service=SERVICE, room=1)
    open_channel(4, slow)


def test_the_only_worker_is_asked_again_and_then_named(join: Join, broker: Broker) -> None:
    device, silent = join("device-1"), join("worker-1")
    for _ in range(3):
        device.send(headers.Open(device.id, 1, SERVICE))
        assert silent.receive(headers.Open)[0].channel == 1

    def time_passes() -> None:
        broker._opens.set_ups._newest[device.id].since -= OPEN_PATIENCE + ANSWER_PATIENCE

    on_loop(broker, time_passes)
    device.send(headers.Open(device.id, 1, SERVICE))
    bounce = device.receive(headers.Bounce)[0]
    assert (bounce.reason, bounce.detail) == ("busy", "worker 'worker-1' did not answer")
    assert not broker._opens.pending


def test_the_silent_worker_is_named_where_others_are_full(
    join: Join, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens_module, "OPEN_PATIENCE", 0.1)
    device, silent = join("device-1"), join("worker-1")
    join("worker-2", room=0)
    device.send(headers.Open(device.id, 1, SERVICE))
    assert silent.receive(headers.Open)[0].channel == 1
    device.send(headers.Open(device.id, 1, SERVICE))
    bounce = device.receive(headers.Bounce)[0]
    assert bounce.reason == "busy"
    assert bounce.detail == "worker 'worker-1' did not answer, and every other worker is full"
