"""Real devices among workers that claim much room and do not answer, over both transports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

import tiny
from split_broker import opens as opens_module
from split_broker.broker import Broker
from split_common.errors import Busy, SplitError
from split_common.protocol import headers
from split_common.transport import placement
from split_device.sessions import channels
from split_device.sessions.client import Client
from split_device.sessions.session import RemoteSession
from valkeys import running_valkey
from wiretap import LATE, FakePeer, Setting, run_steps, step

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))
    for number in range(2, 5):
        setting.fleet.add_member("worker", f"worker-{number}")
    return setting


@pytest.fixture
def broker(setting: Setting) -> Iterator[Broker]:
    with setting.broker() as running:
        yield running


def silent_worker(broker: Broker, setting: Setting, member: str) -> FakePeer:
    """A worker that claims all room there is, and answers nothing."""
    peer = FakePeer(broker.address, setting.fleet, setting.fleet.read_identity(member))
    peer.join(service=setting.service, model="tiny", room=2**61)
    return peer


def opens(peer: FakePeer) -> int:
    """How many opens a fake worker was given."""
    count = 0
    while not peer.silent(headers.Open, 0.1):
        count += 1
    return count


def test_devices_get_past_workers_that_swallow_opens(
    broker: Broker, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "SET_UP_RETRANSMIT", 0.3)
    with (
        silent_worker(broker, setting, "worker-2") as one,
        silent_worker(broker, setting, "worker-3") as other,
        setting.worker(broker.address) as good,
    ):
        for _ in range(4):
            with setting.client(broker.address) as client:
                run_steps(client, 1)
        assert good.counters["channels"] >= 4
        # By their claims they were tried first.
        assert opens(one) >= 1 <= opens(other)


def test_the_only_worker_is_named_if_it_does_not_answer(
    broker: Broker, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "SET_UP_RETRANSMIT", 0.1)
    monkeypatch.setattr(opens_module, "OPEN_PATIENCE", 0.2)
    monkeypatch.setattr(placement, "ANSWER_PATIENCE", 0.2)
    with (
        silent_worker(broker, setting, "worker-2"),
        setting.client(broker.address, timeout=LATE) as client,
        pytest.raises(Busy, match=r"^worker 'worker-2' did not answer$"),
    ):
        client.open_session()


def test_a_worker_that_does_not_confirm_is_named_and_avoided(
    broker: Broker, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers the device's open with its certificate, and then nothing."""
    with setting.worker(broker.address, "worker-2") as silent, setting.client(broker.address) as client:
        monkeypatch.setattr(silent, "_finish_channel", lambda *_: None)
        client._channels._silences = placement.Silences(LATE)
        client.timeout = 2.0
        with pytest.raises(Busy, match=r"^worker 'worker-2/\w+' did not answer"):
            client.open_session()
        # The queue has nothing to say against it now, but the device has.
        broker._opens.set_ups._silences.clear()
        client.timeout = LATE
        with pytest.raises(Busy, match=r"no answer from worker 'worker-2/\w+'"):
            client.open_session()
        with setting.worker(broker.address, "worker-4") as good:
            session = client.open_session()
            assert session.channel.worker == good.id
            assert len(run_steps(client, 1, session=session)) == 2


@pytest.fixture(params=["zmq", "redis"])
def address(request: pytest.FixtureRequest, setting: Setting) -> Iterator[str]:
    """The address of a queue, over each transport."""
    if request.param == "redis":
        with running_valkey() as server:
            yield server.address
    else:
        with setting.broker() as broker:
            yield broker.address


def test_a_worker_that_answers_no_request_gets_one_device_at_a_time(
    address: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(setting.worker(address))
        # By this device's word, the good worker answers.
        first = stack.enter_context(setting.client(address))
        run_steps(first, 1)
        mute = stack.enter_context(setting.worker(address, "worker-2"))
        monkeypatch.setattr(mute, "_request", lambda *_: None)
        monkeypatch.setattr(mute._sessions, "room", lambda *_: placement.MAX_ROOM)
        mute._transport.announce()

        def one_more() -> RemoteSession:
            return stack.enter_context(setting.client(address)).open_session()

        # It gets a device once the queue knows how much room it has.
        while (opened := one_more()).worker != mute.id:
            pass
        threading.Thread(target=_ask, args=(opened,), daemon=True).start()
        assert [one_more().worker for _ in range(5)] == [good.id] * 5


def _ask(session: RemoteSession) -> None:
    with contextlib.suppress(SplitError):
        session.call([step(0)])


def test_once_a_device_has_its_answer_others_get_the_worker_too(address: str, setting: Setting) -> None:
    with setting.worker(address, max_sessions=8) as known, setting.client(address) as first:
        run_steps(first, 1)
        with setting.worker(address, "worker-2") as roomier:

            def has(device: Client) -> bytes:
                session = device.open_session()
                run_steps(device, 1, session=session)
                return session.worker

            with setting.client(address) as second, setting.client(address) as third:
                assert [has(second), has(third)] == [roomier.id] * 2
            assert known.counters["channels"] == 1
