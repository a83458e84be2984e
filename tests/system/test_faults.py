"""What happens when something breaks: nothing is lost that can be kept, and the rest is told by a typed error."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

import fleet as fleets
import tiny
from split_broker import broker as broker_module
from split_broker.broker import GRACE, Broker
from split_broker.peer_queue import Peer, RoutedMessage
from split_common.errors import (
    BrokerUnreachable,
    Busy,
    CertificateError,
    NonFinite,
    NoWorker,
    SessionLost,
)
from split_common.models.loading import read_spec
from split_common.models.verification import find_manifest
from split_common.protocol import channel as channels
from split_common.protocol import headers
from split_common.protocol.handshake import DeviceHandshake
from split_common.system.servers import free_port
from split_common.transport import HEARTBEAT, MISSED, OPEN_PATIENCE, connect, new_peer_id
from split_common.trust import keys as keys_module
from split_common.trust.fleet import load_fleet
from split_common.trust.keys import ModelScope
from split_device import SplitModelForCausalLM
from split_device.models.cache import SessionCacheLayer
from split_device.models.prepared import StepContext
from split_device.models.traits import Traits
from split_device.sessions import channels as channels_module
from split_device.sessions import session as session_module
from split_device.sessions import worker_channel
from split_device.sessions.connection import PATIENCE
from split_worker import channels as worker_channels
from split_worker import set_ups
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker
from wiretap import LATE, SOON, Setting, cheat, in_background, on_loop, run_steps, slowly, step, wait_until

STEPS = 60

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), checkpoint)


@pytest.fixture
def own(tmp_path: Path, checkpoint: Path) -> Setting:
    """A fleet to spoil."""
    return Setting(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[bytes]:
    """What the body answers where nothing breaks."""
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        return run_steps(client, STEPS)


# --- the broker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_broker_restarted_in_mid_generation_loses_nothing(
    setting: Setting, expected: list[bytes], scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    address = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"ipc://{tmp_path}/b"
    with contextlib.ExitStack() as stack:
        first = Broker(address, setting.own_fleet())
        first.start()
        stack.callback(first.stop)
        worker = stack.enter_context(setting.worker(first.address))
        client = stack.enter_context(setting.client(first.address))
        slowly(worker, monkeypatch, 0.02)
        session = client.open_session()
        # It does not get to its end before the broker was restarted twice.
        call, may_go_on = session.call, threading.Semaphore(STEPS // 3)
        monkeypatch.setattr(session, "call", lambda requests: may_go_on.acquire() and call(requests))
        with in_background(lambda: run_steps(client, STEPS, session=session)) as generation:
            for steps in (5, STEPS // 3 + 5):
                wait_until(lambda enough=steps: worker.counters["steps"] > enough)
                first.stop()
                may_go_on.release(STEPS // 3 + 1)
                time.sleep(0.2)
                first = Broker(address, setting.own_fleet())
                first.start()
                stack.callback(first.stop)
            assert generation.result(LATE) == expected
        assert worker.counters["channels"] == 1
        assert worker.counters["steps"] == STEPS + 1


def test_tokens_are_the_same_over_a_restart(checkpoint: Path, setting: Setting) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = tiny.build("llama").generate(prompt, max_new_tokens=80, do_sample=False)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(setting.broker(f"tcp://127.0.0.1:{free_port()}"))
        stack.enter_context(setting.worker(broker.address))
        model = stack.enter_context(
            SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, keys=setting.fleet.path)
        )
        seen = threading.Event()
        count = 0

        def watch(_peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
            nonlocal count
            count += isinstance(header, headers.Relay)
            if count == 60:
                seen.set()
            # It does not get to its end before the restart.
            return [] if count >= 60 and isinstance(header, headers.Relay) else [message]

        cheat(broker, watch)
        with in_background(lambda: model.generate(prompt, max_new_tokens=80, do_sample=False)) as generation:
            assert seen.wait(LATE)
            broker.stop()
            stack.enter_context(setting.broker(broker.address))
            assert torch.equal(generation.result(LATE), wanted)


MESSAGES: dict[str, Callable[[headers.AnyHeader], bool]] = {
    "open": lambda header: isinstance(header, headers.Open),
    "answer": lambda header: isinstance(header, headers.Relay) and header.kind == headers.RelayKind.ANSWER,
    "finish": lambda header: isinstance(header, headers.Relay) and header.kind == headers.RelayKind.FINISH,
    "confirmation": lambda header: (
        isinstance(header, headers.Relay) and header.kind == headers.RelayKind.REPLY and not header.session
    ),
    "first request": lambda header: isinstance(header, headers.Relay) and header.kind == headers.RelayKind.REQUEST,
    "later request": lambda header: (
        isinstance(header, headers.Relay) and header.kind == headers.RelayKind.REQUEST and header.seq == 5
    ),
    "reply": lambda header: (
        isinstance(header, headers.Relay)
        and header.kind == headers.RelayKind.REPLY
        and header.session != 0
        and header.seq == 5
    ),
}


@pytest.mark.parametrize("lost", MESSAGES)
@pytest.mark.parametrize("restart", [False, True], ids=["alone", "with the broker"])
def test_any_message_may_be_lost(
    setting: Setting, expected: list[bytes], lost: str, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A new broker makes a device send again at once; without one, time does.
    monkeypatch.setattr(session_module, "RETRANSMIT", 60.0 if restart else 0.3)
    monkeypatch.setattr(channels_module, "SET_UP_RETRANSMIT", 0.3)
    dropped = threading.Event()

    def drop(_peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
        if MESSAGES[lost](header) and not dropped.is_set():
            dropped.set()
            return []
        return [] if restart and dropped.is_set() else [message]

    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(setting.broker(f"tcp://127.0.0.1:{free_port()}"))
        stack.enter_context(setting.worker(broker.address))
        client = stack.enter_context(setting.client(broker.address))
        cheat(broker, drop)
        with in_background(lambda: run_steps(client, STEPS)) as generation:
            assert dropped.wait(LATE)
            if restart:
                broker.stop()
                stack.enter_context(setting.broker(broker.address))
            # Sooner than it would be sent again by itself.
            assert generation.result(40) == expected


def test_no_nonce_seals_two_plaintexts_whatever_is_lost_and_repeated(
    setting: Setting, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed: dict[tuple[bytes, int], set[bytes]] = {}
    plain_seal = channels.Box.seal

    def seal(box: channels.Box, counter: int, data: bytes, plaintext: bytes) -> bytes:
        sealed.setdefault((box._key, counter), set()).add(data + plaintext)
        return plain_seal(box, counter, data, plaintext)

    monkeypatch.setattr(channels.Box, "seal", seal)
    monkeypatch.setattr(session_module, "RETRANSMIT", 0.2)
    calls = 0

    def lose_and_repeat(_peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
        nonlocal calls
        if not isinstance(header, headers.Relay):
            return [message]
        calls += 1
        return [] if calls % 17 == 0 else [message] * (1 + calls % 3)

    with (
        setting.broker() as broker,
        setting.worker(broker.address, max_sessions=2) as worker,
        setting.client(broker.address) as client,
    ):
        cheat(broker, lose_and_repeat)
        assert run_steps(client, STEPS) == expected
        # Refusals too: a full worker's, and of a session that it has not. The end of the one above may be lost.
        with worker._lock:
            worker._sessions.close_where(lambda _: True)
        sessions = [client.open_session() for _ in range(3)]
        for session in sessions[:2]:
            session.call([step(0)])
        with pytest.raises(Busy):
            sessions[2].call([step(0)])
        with worker._lock:
            worker._sessions.close_where(lambda _: True)
        with pytest.raises(SessionLost):
            sessions[0].call([step(1)])
    assert len(sealed) > 2 * STEPS
    assert all(len(plaintexts) == 1 for plaintexts in sealed.values())


def test_a_broker_that_stays_away_is_told_in_time(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address),
        setting.client(broker.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        client.timeout = 1.0
        broker.stop()
        began = time.monotonic()
        with pytest.raises(BrokerUnreachable):
            session.call([step(1)])
        assert time.monotonic() - began < HEARTBEAT * MISSED + 1.0 + LATE


# --- the worker --------------------------------------------------------------------------------------------


def generate_on_and_on(model: Any, prompt: torch.Tensor) -> None:
    while True:
        model.generate(prompt, max_new_tokens=200)


def test_a_worker_process_that_hangs_or_is_killed_is_noticed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_manifest(load_fleet(), read_spec(str(checkpoint)).checkpoint, [])
    with (
        fleets.running_broker() as broker,
        subprocess.Popen(
            [sys.executable, "-m", "worker_main", str(checkpoint), broker.address],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, patience=0) as model:
                prompt = torch.tensor([[5, 6, 7, 8]])
                # One that hangs is known by its silence; one that was killed is, long before, by its connection.
                for kill, missed in ((signal.SIGSTOP, MISSED), (signal.SIGKILL, 600)):
                    monkeypatch.setattr(broker_module, "MISSED", missed)
                    # On a busy machine it may have seemed dead before, and has just come back.
                    wait_until(lambda: fleets.generates(model, prompt))
                    (worker,) = [peer for peer in list(broker._peers.values()) if peer.role == "worker"]
                    begun = model.timings.steps
                    with in_background(
                        lambda: [model.generate(prompt, max_new_tokens=240) for _ in range(99)]
                    ) as work:
                        wait_until(lambda begun=begun: model.timings.steps > begun + 5)
                        os.kill(process.pid, kill)
                        with pytest.raises(SessionLost):
                            work.result(HEARTBEAT * MISSED + LATE)
                    if kill == signal.SIGSTOP:
                        assert time.monotonic() - worker.seen > HEARTBEAT * MISSED
                        os.kill(process.pid, signal.SIGCONT)
                with pytest.raises(NoWorker):
                    model.generate(prompt, max_new_tokens=1)
        finally:
            process.kill()


def test_what_nobody_wants_any_more_looks_for_no_worker(setting: Setting) -> None:
    """A broker that has just begun lets devices wait: workers may be about to come back."""
    with setting.broker() as broker, setting.client(broker.address) as client, ThreadPoolExecutor(3) as pool:
        sessions = [SessionCacheLayer(client, Traits(False, False)) for _ in range(3)]
        steps = [pool.submit(session.step, torch.zeros(1, 1, 8), StepContext()) for session in sessions]
        wait_until(lambda: client._channels._answers)
        for session in sessions:
            session.abandon()
        for outcome in steps:
            with pytest.raises(SessionLost, match="given up"):
                outcome.result(LATE)


def test_a_worker_that_leaves_is_gone_at_once(setting: Setting) -> None:
    with setting.broker() as broker, setting.client(broker.address) as client:
        with setting.worker(broker.address):
            session = client.open_session()
            session.call([step(0)])
        with pytest.raises(SessionLost):
            session.call([step(1)])
        assert session.ended
        with pytest.raises(SessionLost):
            session.call([step(1)])


def test_sessions_are_freed_on_close_idleness_and_the_devices_death(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        held = worker._sessions
        closed, idle = client.open_session(), client.open_session()
        for session in (closed, idle):
            session.call([step(0)])
        assert len(held) == 2
        closed.close()
        wait_until(lambda: len(held) == 1)
        (left,) = held._sessions.values()
        left.used -= WorkerLimits().idle_timeout
        wait_until(lambda: len(held) == 0)
        with pytest.raises(SessionLost, match="does not hold"):
            idle.call([step(1)])
        monkeypatch.setattr(broker_module, "MISSED", MISSED)
        broker._started -= GRACE
        alive = client.open_session()
        alive.call([step(0)])
        with monkeypatch.context() as patch:
            patch.setattr(client.transport, "_send_announcement", lambda *_, **__: True)
            wait_until(lambda: len(held) == 0)
        # The device was not dead after all: it is told so, instead of waiting for a worker that does not know it.
        with pytest.raises((SessionLost, BrokerUnreachable)):
            alive.call([step(1)])
        client.open_session().call([step(0)])


def test_a_draining_worker_ends_what_it_has_and_takes_no_more(setting: Setting) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address, patience=0.5) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        assert worker.drain(0.3) is False
        with in_background(lambda: worker.drain(60)) as draining:
            session.call([step(1)])
            with pytest.raises(Busy):
                client.open_session().call([step(0)])
            session.call([step(2)])
            session.close()
            assert draining.result(LATE) is True


def test_stopping_does_not_wait_for_what_is_queued(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        setting.broker() as broker,
        setting.client(broker.address) as client,
        setting.worker(broker.address) as worker,
    ):
        session = client.open_session()
        session.call([step(0)])
        slowly(worker, monkeypatch, 0.5)
        with in_background(lambda: session.call([step(1 + i) for i in range(30)])) as work:
            wait_until(lambda: worker._compute.queued_bytes > 0)
            worker.stop()
            # All of it would take long.
            assert worker.counters["steps"] < 30
            with pytest.raises(SessionLost):
                work.result(LATE)


def test_many_requests_at_once_are_answered_in_order(setting: Setting, expected: list[bytes]) -> None:
    """A long prefill in chunks: more of them than may be in flight."""
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        session = client.open_session()
        most = 0
        send = session._send

        def count(*request: Any) -> None:
            nonlocal most
            send(*request)
            most = max(most, len(session.in_flight))

        session._send = count  # type: ignore[method-assign]
        answers = session.call([step(0, 7), *(step(7 + i) for i in range(STEPS))])
        assert [bytes(tensor) for _, tensor in answers] == expected
        assert most == session_module.IN_FLIGHT


# --- room --------------------------------------------------------------------------------------------------


def test_a_device_waits_for_room_and_goes_on(checkpoint: Path, setting: Setting) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = tiny.build("llama").generate(prompt, max_new_tokens=5, do_sample=False)
    with (
        setting.broker() as broker,
        setting.worker(broker.address, max_sessions=1, evict_after=600.0) as worker,
        setting.client(broker.address) as other,
        SplitModelForCausalLM.from_pretrained(
            checkpoint, broker=broker.address, keys=setting.fleet.path, patience=60
        ) as model,
    ):
        holder = other.open_session()
        holder.call([step(0)])
        with in_background(lambda: model.generate(prompt, max_new_tokens=5, do_sample=False)) as generation:
            wait_until(lambda: broker.counters["bounced_busy"] > 0)
            wait_until(lambda: broker._opens.pending)
            assert not generation.done()
            assert worker.counters["channels"] <= 2
            holder.close()
            assert torch.equal(generation.result(LATE), wanted)


def test_patience_ends_with_busy(setting: Setting) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address, max_sessions=1) as worker,
        setting.client(broker.address) as holder,
        setting.client(broker.address, patience=1.0) as client,
    ):
        holder.open_session().call([step(0)])
        began = time.monotonic()
        worker._transport.announce()
        wait_until(lambda: broker._peers[worker.id].seen > began and broker._peers[worker.id].room == 0)
        with pytest.raises(Busy, match="full"):
            client.open_session()
        # Sooner than it would be by the patience that a device has unless told otherwise.
        assert time.monotonic() - began < OPEN_PATIENCE + 1.0 + SOON < PATIENCE


# --- bad input ---------------------------------------------------------------------------------------------


def test_states_that_are_not_finite_are_refused_and_change_nothing(setting: Setting, expected: list[bytes]) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        session = client.open_session()
        assert bytes(session.call([step(0, 7)])[0][1]) == expected[0]
        request, states = step(7)
        for poison in (float("nan"), float("inf")):
            bad = bytearray(states)
            bad[8:12] = torch.tensor([poison]).numpy().tobytes()
            with pytest.raises(NonFinite):
                session.call([(request, memoryview(bad))])
        assert bytes(session.call([(request, states)])[0][1]) == expected[1]
        assert worker.counters["refused_non-finite"] == 2


def test_other_weights_or_ranges_find_no_worker(tmp_path: Path, setting: Setting) -> None:
    """The same architecture: found at set-up by the manifest's root, never by wrong tokens."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    other = Setting(tmp_path, tmp_path / "other")
    assert other.service != setting.service
    narrower = msgspec.structs.replace(setting.service, first=3)
    for service in (other.service, narrower):
        with (
            setting.broker() as broker,
            setting.worker(broker.address) as worker,
            setting.client(broker.address, service=service) as client,
        ):
            broker._started -= GRACE
            began = time.monotonic()
            with pytest.raises(NoWorker, match=f"served here: {setting.manifest.name} 2:4"):
                client.open_session()
            assert time.monotonic() - began < SOON < PATIENCE
            assert worker.counters["steps"] == 0


def test_a_broker_cannot_pass_one_service_off_as_another(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    other = msgspec.structs.replace(setting.service, root=bytes(32))
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address, service=other, patience=0.1) as client,
    ):
        client.timeout = 1.0
        candidates = broker._opens.candidates
        passed_off = lambda: [one._replace(service=other) for one in candidates()]  # noqa: E731
        monkeypatch.setattr(broker._opens, "candidates", passed_off)
        with pytest.raises(Busy, match="no worker answered"):
            client.open_session()
        wait_until(lambda: worker._transport.counters["AuthenticationError"] >= 1)  # type: ignore[attr-defined]
        assert worker.counters["channels"] == 0


def days_pass(days: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the clock by which certificates are judged."""
    late = SimpleNamespace(time=lambda: time.time() + 86_400 * days, monotonic=time.monotonic)
    monkeypatch.setattr(channels, "time", late)
    monkeypatch.setattr(keys_module, "time", late)


@pytest.mark.parametrize("role", ["device", "worker"])
def test_an_expired_or_unfit_certificate_is_told_by_its_owner(
    own: Setting, role: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = ModelScope(bytes(32), 0, 99)
    own.fleet.add_member(role, "elsewhere", [elsewhere])
    own.fleet.add_member(role, "old", days=1)
    days_pass(1, monkeypatch)
    with own.broker() as broker, own.worker(broker.address):
        for member, words in (("old", "expired"), ("elsewhere", "does not cover")):
            start = own.worker if role == "worker" else own.client
            with contextlib.ExitStack() as stack, pytest.raises(CertificateError, match=words):
                stack.enter_context(start(broker.address, member)).open_session()


def test_a_worker_whose_certificate_runs_out_is_left_for_one_that_is_good(
    own: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.fleet.add_member("worker", "brief", days=1)
    with (
        own.broker() as broker,
        own.worker(broker.address, "brief", max_sessions=1000) as brief,
        own.client(broker.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        brief.check()
        days_pass(1, monkeypatch)
        wait_until(lambda: session.ended)
        # The device has seen it by itself, or the broker has put the worker out.
        with pytest.raises(SessionLost, match=r"run out|gone"):
            session.call([step(1)])
        with pytest.raises((CertificateError, NoWorker), match="'brief' expired"):
            client.open_session()
        with own.worker(broker.address, max_sessions=1) as good:
            client.open_session().call([step(0)])
            assert good.counters["steps"] == 1
        # Its process ends.
        wait_until(lambda: brief.announcement().leaving)
        with pytest.raises(CertificateError, match="'brief' expired"):
            brief.check()


def test_a_device_whose_certificate_runs_out_is_put_out(own: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    own.fleet.add_member("device", "brief", days=1)
    with (
        own.broker() as broker,
        own.worker(broker.address) as worker,
        own.client(broker.address, "brief") as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        days_pass(1, monkeypatch)
        wait_until(lambda: not worker._channels.open)
        wait_until(lambda: len(worker._sessions) == 0)
        with pytest.raises(SessionLost):
            session.call([step(1)])
        with pytest.raises(CertificateError, match="expired"):
            client.open_session()


def test_a_revoked_worker_is_left_while_all_run(own: Setting) -> None:
    own.fleet.add_member("worker", "worker-2")
    with own.broker() as broker, own.client(broker.address) as client, contextlib.ExitStack() as stack:
        first = stack.enter_context(own.worker(broker.address, "worker-1", max_sessions=1000))
        second = stack.enter_context(own.worker(broker.address, "worker-2", max_sessions=1))
        session = client.open_session()
        session.call([step(0)])
        assert first.counters["steps"] == 1
        own.fleet.revoke("worker-1")
        wait_until(lambda: session.ended)
        with pytest.raises(SessionLost):
            session.call([step(1)])
        client.open_session().call([step(0)])
        assert second.counters["steps"] == 1


def test_a_revoked_device_is_put_out_while_all_run(own: Setting) -> None:
    own.fleet.add_member("device", "device-2")
    with (
        own.broker() as broker,
        own.worker(broker.address) as worker,
        own.client(broker.address) as client,
        own.client(broker.address, "device-2") as bystander,
    ):
        session, other = client.open_session(), bystander.open_session()
        session.call([step(0)])
        other.call([step(0)])
        own.fleet.revoke("device-1")
        wait_until(lambda: session.ended)
        wait_until(lambda: len(worker._sessions) == 1)
        for call in (lambda: session.call([step(1)]), client.open_session):
            with pytest.raises(CertificateError, match="revoked"):
                call()
        other.call([step(1)])


def test_a_fleet_shared_by_threads_is_obeyed_as_well(own: Setting) -> None:
    """Where broker and worker hold one `Fleet`, the broker's rereading of the file makes it new for both."""
    with own.broker() as broker, own.client(broker.address) as client:
        transport = connect(broker.address, broker._fleet, own.fleet.read_identity("worker-1"))
        worker = Worker(
            own.body, own.service, "tiny", own.fleet.read_identity("worker-1"), broker._fleet, transport
        )
        worker.start()
        client.open_session().call([step(0)])
        own.fleet.revoke("device-1")
        wait_until(lambda: not worker._channels.open)
        worker.stop()


# --- the device's own end ----------------------------------------------------------------------------------


def test_an_interrupted_call_frees_its_session(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(session, "_next_event", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.call([step(1)])
        wait_until(lambda: len(worker._sessions) == 0)
        assert session.ended
        assert not client._sessions


def test_the_garbage_collector_may_close_sessions_in_any_thread(setting: Setting) -> None:
    """Also in the link's own, in the middle of what it does with the client's lock."""

    class Holder:
        pass

    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        announcement = client.announcement

        def collecting() -> headers.Announce:
            with client._lock:
                gc.collect()
                return announcement()

        client.announcement = collecting  # type: ignore[method-assign]
        gc.disable()
        # A collection of all that the tests have imported would hold up all threads longer than links wait.
        gc.freeze()
        try:
            for _ in range(5):
                session = client.open_session()
                session.call([step(0)])
                holder = Holder()
                holder.itself = holder  # type: ignore[attr-defined]
                weakref.finalize(holder, session.close)
                del holder, session
                client.transport.announce()
            # The link's thread, which closes them, forgets a session just after it has told the worker.
            wait_until(lambda: not worker._sessions and not client._sessions)
        finally:
            gc.enable()
        run_steps(client, 3)


def test_a_link_closed_by_its_own_thread_ends(setting: Setting) -> None:
    with setting.broker() as broker, setting.client(broker.address) as client:
        client.on_reset = client.close  # type: ignore[method-assign]
        (peer,) = broker._peers.values()
        on_loop(broker, lambda: broker._delivery.put(peer, (headers.encode_header(headers.Welcome(bytes(8))), b"")))
        thread = client.transport._thread  # type: ignore[attr-defined]
        thread.join(LATE)
        assert not thread.is_alive()
        assert client.transport.counters["HandlerError"] == 0


def test_channels_are_bounded_and_a_forgotten_one_is_told(
    setting: Setting, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_channels, "MAX_CHANNELS_PER_DEVICE", 2)
    monkeypatch.setattr(worker_channel, "CHANNEL_SESSIONS", 2)
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        sessions = [client.open_session() for _ in range(6)]
        assert len({session.channel.number for session in sessions}) == 3
        assert len(worker._channels.open) == 2
        with pytest.raises(SessionLost):
            sessions[0].call([step(0)])
        assert sessions[1].ended
        assert run_steps(client, STEPS, session=sessions[4]) == expected


def test_half_open_channels_are_bounded_and_cost_no_session(setting: Setting) -> None:
    with setting.broker() as broker, setting.worker(broker.address) as worker:
        for number in range(set_ups.MAX_HALF_OPEN + 50):
            hello = DeviceHandshake(
                setting.fleet.read_identity("device-1"), lambda *_: None, setting.service, "float32"
            ).hello
            worker.on_message(headers.Open(new_peer_id("device-1"), number, setting.service), hello)
        half_open = worker._channels.set_ups.half_open
        assert len(half_open) == set_ups.MAX_HALF_OPEN
        assert len(worker._sessions) == len(worker._channels.open) == 0
        with worker._lock:
            for half in half_open.values():
                half.since -= set_ups.HALF_OPEN_TIMEOUT
        worker.announcement()
        assert not half_open


def test_threads_share_one_channel(setting: Setting, expected: list[bytes]) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        for answers in pool.map(lambda _: run_steps(client, STEPS), range(4)):
            assert answers == expected
        assert worker.counters["channels"] == 1
