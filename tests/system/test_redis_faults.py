"""What happens over Redis when something breaks, and that nothing is left in it afterwards."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
from redis.connection import Connection
from redis.exceptions import InvalidResponse

import tiny
from fleet import generates
from split_common.errors import BrokerUnreachable, Busy, NoWorker, SessionLost
from split_common.models.loading import read_spec
from split_common.models.verification import find_manifest
from split_common.protocol import encoding, headers, payloads
from split_common.transport import HEARTBEAT, MISSED, OPEN_PATIENCE, connect, leader, new_peer_id
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.redis import lease, membership, opens
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.lease import LEASE
from split_common.transport.redis.membership import CROWDED_BYTES, SMALL_BYTES, Registry
from split_common.transport.redis.server import RedisConnections
from split_common.trust.fleet import load_fleet
from split_device import SplitModelForCausalLM
from split_worker.worker import Worker
from valkeys import Valkey, running_valkey
from wiretap import LATE, Setting, in_background, run_steps, slowly, step, wait_until

STEPS = 60

#: The most tokens for which a decoding step has room: a token, and a tree of drafts.
TOKENS = 33

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def server() -> Iterator[Valkey]:
    with running_valkey() as running:
        yield running
        wait_until(lambda: not any(streams(running).values()), LEASE + LATE)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[bytes]:
    with running_valkey() as server, setting.worker(server.address), setting.client(server.address) as client:
        return run_steps(client, STEPS)


def streams(server: Valkey) -> dict[bytes, int]:
    """Number of entries in each stream."""
    client = server.client()
    lengths = {}
    for key in client.keys("ls:*"):
        if client.type(key) == b"stream":
            lengths[key] = client.xlen(key)
    return lengths


# --- the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True], ids=["forgetful", "persistent"])
@pytest.mark.parametrize("down", [0.3, pytest.param(LEASE + 0.5, marks=pytest.mark.long)], ids=["short", "long"])
def test_a_server_that_fails_in_mid_generation_loses_nothing(
    checkpoint: Path, setting: Setting, persistent: bool, down: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if down > LEASE:
        monkeypatch.setattr(lease, "LEASE", LEASE)
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = tiny.build("llama").generate(prompt, max_new_tokens=200, do_sample=False)
    with (
        running_valkey(persistent=persistent) as server,
        setting.worker(server.address) as worker,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=server.address, keys=setting.fleet.path) as model,
    ):
        passes = threading.Semaphore(0)
        model.register_forward_pre_hook(lambda *_: (passes.release(), time.sleep(0.01))[:0] or None)
        with in_background(lambda: model.generate(prompt, max_new_tokens=200, do_sample=False)) as generation:
            for _ in range(2 if down < LEASE else 1):
                for _ in range(30):
                    assert passes.acquire(timeout=LATE)
                server.kill()
                time.sleep(down)
                server.start()
            assert torch.equal(generation.result(LATE), wanted)
        if down < LEASE:
            # Not even replayed: the session is where it was.
            assert model.traffic["replays"] == 0
            assert worker.counters["channels"] == 1
        wait_until(lambda: not any(streams(server).values()))


@pytest.fixture(scope="module")
def checkpoint(setting: Setting) -> Path:
    return setting.checkpoint


@pytest.mark.long
def test_connections_that_are_cut_all_the_time_lose_nothing(
    setting: Setting, server: Valkey, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        slowly(worker, monkeypatch, 0.02)
        session = client.open_session()
        # A few steps for each cut, so that there are many.
        call, may_go_on = session.call, threading.Semaphore(5)
        monkeypatch.setattr(session, "call", lambda requests: may_go_on.acquire() and call(requests))
        with in_background(lambda: run_steps(client, STEPS, session=session)) as generation:
            while not generation.done():
                time.sleep(0.1)
                server.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                may_go_on.release(5)
            assert generation.result() == expected
        assert worker.counters["channels"] == 1


def test_a_message_that_is_written_twice_is_computed_once(
    setting: Setting, server: Valkey, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the answer to a write is lost: the writer cannot know, and writes again."""
    run, post = RedisConnections.run, RedisConnections.post
    written = Counter[str]()

    def run_twice(connections: Any, commands: Any, posted: int = 0) -> Any:
        answers = run(connections, commands, posted)
        if any(words[0] == "XADD" for _, words in commands[posted:]):
            written["by the thread"] += 1
            run(connections, commands[posted:])
        return answers

    def post_twice(connections: Any, command: Any) -> bool:
        posted = post(connections, command)
        if posted and command[1][0] == "XADD":
            written["by the sender"] += 1
            server.client().execute_command(*command[1])
        return posted

    monkeypatch.setattr(RedisConnections, "run", run_twice)
    monkeypatch.setattr(RedisConnections, "post", post_twice)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        assert run_steps(client, STEPS) == expected
        assert worker.counters["steps"] == STEPS + 1
    assert written["by the thread"] > 0
    assert written["by the sender"] > STEPS


def test_a_server_that_takes_no_changes_for_a_while_loses_nothing(
    checkpoint: Path, setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it cannot save. All leases end meanwhile, and nothing is given up."""
    monkeypatch.setattr(lease, "LEASE", LEASE)
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = tiny.build("llama").generate(prompt, max_new_tokens=40, do_sample=False)
    with (
        setting.worker(server.address) as worker,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=server.address, keys=setting.fleet.path) as model,
    ):
        passes = threading.Semaphore(0)
        model.register_forward_pre_hook(lambda *_: (passes.release(), time.sleep(0.01))[:0] or None)
        with in_background(lambda: model.generate(prompt, max_new_tokens=40, do_sample=False)) as generation:
            assert passes.acquire(timeout=LATE)
            server.client().config_set("min-replicas-to-write", "1")
            wait_until(lambda: "NOREPLICAS" in worker._transport._parts.housekeeper.failure)
            wait_until(lambda: not server.client().exists(worker._transport._parts.lease.lane), LEASE + LATE)
            server.client().config_set("min-replicas-to-write", "0")
            assert torch.equal(generation.result(LATE), wanted)


def test_a_server_that_stays_away_is_told_in_time(setting: Setting) -> None:
    with (
        running_valkey() as server,
        setting.worker(server.address),
        setting.client(server.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        client.timeout = 1.0
        server.kill()
        began = time.monotonic()
        with pytest.raises(BrokerUnreachable):
            session.call([step(1)])
        assert time.monotonic() - began < HEARTBEAT * MISSED + 1.0 + LATE


def test_a_server_that_hangs_holds_no_sender_up_and_gets_all_in_order(setting: Setting, server: Valkey) -> None:
    arrived: list[int] = []
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        session = client.open_session()
        session.call([step(0)])
        worker._transport._parts._caller.message = lambda header, _: arrived.append(header.seq)
        header = headers.Relay(
            worker.id, client.id, headers.RelayKind.REQUEST, session.channel.number, session.ref, 0, 0, 0
        )

        def send_all() -> None:
            for seq in range(200):
                client.transport.send(msgspec.structs.replace(header, seq=seq), bytes(2000 if seq != 20 else 2**20))

        server.signal(signal.SIGSTOP)
        with in_background(send_all) as sent:
            try:
                sent.result(LATE)
            finally:
                server.signal(signal.SIGCONT)
        wait_until(lambda: len(arrived) >= 200)
        assert arrived == list(range(200))


def test_a_server_without_memory_pushes_back(setting: Setting, server: Valkey, expected: list[bytes]) -> None:
    with setting.worker(server.address), setting.client(server.address) as client:
        session = client.open_session()
        answers = [bytes(session.call([step(0, 7)])[0][1])]
        server.client().config_set("maxmemory", "1mb")
        with in_background(lambda: session.call([step(7)])) as work:
            wait_until(lambda: client.transport.counters["bounced_full"] > 0)
            assert not work.done()
            server.client().config_set("maxmemory", "0")
            answers.append(bytes(work.result(LATE)[0][1]))
        assert answers == expected[:2]
        session.close()


# --- who reads ---------------------------------------------------------------------------------------------


def test_a_caller_that_waits_alone_reads_itself(
    setting: Setting, server: Valkey, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.worker(server.address), setting.client(server.address) as client:
        session = client.open_session()
        take, readers = client.transport._parts.reader._take, Counter[threading.Thread]()

        def record(fields: Any) -> None:
            readers[threading.current_thread()] += 1
            take(fields)

        monkeypatch.setattr(client.transport._parts.reader, "_take", record)
        # However long it needs between two messages, and however long these take.
        monkeypatch.setattr(leader, "LEAD_GAP", 30.0)
        monkeypatch.setattr(leader, "LEAD_WAIT", 30.0)
        assert run_steps(client, STEPS, session=session) == expected
    # The first one may find the link's thread at it.
    assert readers[threading.current_thread()] >= STEPS


def test_damaged_answers_do_not_reach_the_caller_that_reads(
    setting: Setting, server: Valkey, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "LEAD_GAP", 30.0)
    read, rng, damages = Connection.read_response, random.Random(0), Counter[str]()

    def damaged(connection: Any, *args: Any, **options: Any) -> Any:
        answer = read(connection, *args, **options)
        if threading.current_thread() is not threading.main_thread() or not isinstance(answer, list):
            return answer
        damage = rng.choice(["none", "none", "protocol", "shape", "id", "number"])
        damages[damage] += 1
        match damage:
            case "protocol":
                raise InvalidResponse("Protocol error")
            case "shape":
                return [answer[0][:1]]
            case "id":
                return [[answer[0][0], [[b"1_0-7", answer[0][1][0][1]]]]]
            case "number":
                return [[answer[0][0], 7]]
            case _:
                return answer

    with setting.worker(server.address), setting.client(server.address) as client:
        session = client.open_session()
        monkeypatch.setattr(Connection, "read_response", damaged)
        assert run_steps(client, STEPS, session=session) == expected
        monkeypatch.undo()
    assert len(damages) == 5


def test_who_waits_beside_a_caller_that_reads_is_read_for_when_that_one_leaves(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "LEAD_GAP", 600.0)
    monkeypatch.setattr(leader, "LEAD_WAIT", 600.0)
    arrived: list[queue.SimpleQueue[int]] = [queue.SimpleQueue(), queue.SimpleQueue()]
    with setting.client(server.address) as client, ThreadPoolExecutor(2) as pool:
        link = client.transport
        link._parts._caller.message = lambda header, _: arrived[header.seq].put(header.seq)

        def reply(seq: int) -> None:
            header = headers.Relay(client.id, bytes(8), headers.RelayKind.REPLY, 1, 1, 0, seq, 1)
            server.client().xadd(link._parts.lease.lane, {"h": headers.encode_header(header), "b": b""})

        link._parts.reader.leader_lock._left = time.monotonic()
        wait_until(lambda: not link._parts.reader.leader_lock.turn.locked())
        reading = pool.submit(link.receive, arrived[0], 4.0)
        wait_until(link._parts.reader.leader_lock.turn.locked)
        other = pool.submit(link.receive, arrived[1], 600.0)
        wait_until(lambda: link._parts.reader.leader_lock._waiting)
        reply(0)
        assert reading.result(LATE) == 0
        reply(1)
        try:
            assert other.result(LATE) == 1
        finally:
            link._parts.reader.leader_lock._wanted.set()
            arrived[1].put(-1)


def test_a_caller_that_reads_can_be_interrupted(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        session = client.open_session()
        session.call([step(0)])
        monkeypatch.setattr(worker._transport._parts.reader, "_take", lambda _: None)
        with in_background(lambda: session.call([step(1)])) as work:
            wait_until(lambda: client.transport._parts.reader.leader_lock.turn.locked())
            session.interrupt()
            with pytest.raises(SessionLost, match="given up"):
                work.result(LATE)


# --- workers and devices -----------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_process(checkpoint: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "worker_main", str(checkpoint), address],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_a_worker_process_that_hangs_or_is_killed_is_noticed(checkpoint: Path, server: Valkey) -> None:
    find_manifest(load_fleet(), read_spec(str(checkpoint)).checkpoint, [])
    prompt = torch.tensor([[5, 6, 7, 8]])
    with (
        worker_process(checkpoint, server.address) as process,
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=server.address, patience=0) as model,
    ):
        for kill in (signal.SIGSTOP, signal.SIGKILL):
            # On a busy machine it may have seemed dead before, and has just come back.
            wait_until(lambda: generates(model, prompt))
            begun = model.timings.steps
            with in_background(lambda: [model.generate(prompt, max_new_tokens=240) for _ in range(99)]) as work:
                wait_until(lambda begun=begun: model.timings.steps > begun + 5)
                os.kill(process.pid, kill)
                with pytest.raises(SessionLost):
                    work.result(LEASE + LATE)
                # Not before its lease has ended.
                assert not server.client().keys("*{w:*")
            if kill == signal.SIGSTOP:
                os.kill(process.pid, signal.SIGCONT)
        with pytest.raises(NoWorker):
            model.generate(prompt, max_new_tokens=1)
    wait_until(lambda: not any(streams(server).values()), LEASE + LATE)


def test_a_worker_that_leaves_is_gone_at_once(setting: Setting, server: Valkey) -> None:
    with setting.client(server.address) as client:
        with setting.worker(server.address):
            session = client.open_session()
            session.call([step(0)])
        with pytest.raises(SessionLost):
            session.call([step(1)])


def test_a_worker_that_hangs_leaves_and_comes_back(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address, patience=0) as client:
        session = client.open_session()
        session.call([step(0)])
        with monkeypatch.context() as patch:
            patch.setattr(worker._compute, "stuck", lambda: True)
            wait_until(lambda: session.ended)
            with pytest.raises(NoWorker):
                client.open_session()
        # It learns that its devices were told, and holds nothing of them.
        wait_until(lambda: len(worker._sessions) == 0)
        wait_until(lambda: client_finds(client))
        client.open_session().call([step(0)])


def client_finds(client: Any) -> bool:
    try:
        return client.open_session() is not None
    except NoWorker:
        return False


def test_a_device_that_is_taken_for_dead_frees_its_sessions_and_comes_back(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE", LEASE)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        session = client.open_session()
        session.call([step(0)])
        assert len(worker._sessions) == 1
        parts = client.transport._parts
        with monkeypatch.context() as patch:
            patch.setattr(parts.housekeeper, "_turn", lambda: None)
            wait_until(lambda: len(worker._sessions) == 0, LEASE + LATE)
            assert time.monotonic() - parts.lease.heard > LEASE
        # It was told that it is gone, as those that it watches were.
        wait_until(lambda: session.ended)
        client.open_session().call([step(0)])
    wait_until(lambda: not any(streams(server).values()))


def test_a_roster_that_is_refused_keeps_no_death_from_being_noticed(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster in the server is not trusted: whoever may write there can put another one in its place."""
    monkeypatch.setattr(lease, "LEASE", LEASE)
    keys = Keys(setting.fleet.operator_key)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        client.open_session().call([step(0)])
        counters = worker._transport.counters  # type: ignore[attr-defined]
        try:
            for number in range(3):
                server.client().set(keys.roster, b"of another fleet, %d" % number)
                wait_until(lambda number=number: counters["CertificateError"] > number)
            with monkeypatch.context() as patch:
                patch.setattr(client.transport._parts.housekeeper, "_turn", lambda: None)  # type: ignore[attr-defined]
                wait_until(lambda: len(worker._sessions) == 0, LEASE + LATE)
        finally:
            server.client().delete(keys.roster)


# --- opens -------------------------------------------------------------------------------------------------


def announce_no_room(worker: Worker, server: Valkey, keys: Keys) -> None:
    """Until devices can see that a worker is full."""
    worker._transport.announce()

    def is_full() -> bool:
        _, (announced,) = membership.read_list("worker-1", server.client().get(keys.workers("worker-1")))
        return announced.room == 0

    wait_until(is_full)


def test_an_open_that_cannot_be_met_is_answered(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(setting.fleet.operator_key)
    with setting.client(server.address, patience=0) as client:
        with pytest.raises(NoWorker, match="served here: none"):
            client.open_session()
        with setting.worker(server.address, max_sessions=1) as worker:
            other = headers.Service(bytes(32), 0, 1)
            with (
                setting.client(server.address, patience=0, service=other) as stranger,
                pytest.raises(NoWorker, match=r" 2:4 \(worker-1"),
            ):
                stranger.open_session()
            with monkeypatch.context() as patch:
                # What waiting does not help is answered without.
                patch.setattr(opens, "OPEN_PATIENCE", 600.0)
                with pytest.raises(Busy):
                    client.open_session([worker.id])
            client.open_session().call([step(0)])
            announce_no_room(worker, server, keys)
            with setting.client(server.address, patience=0) as late:
                began = time.monotonic()
                with pytest.raises(Busy):
                    late.open_session()
                assert OPEN_PATIENCE - 0.1 < time.monotonic() - began < OPEN_PATIENCE + LATE


def test_an_open_waits_for_room(setting: Setting, server: Valkey) -> None:
    with (
        setting.worker(server.address, max_sessions=1) as worker,
        setting.client(server.address) as first,
        setting.client(server.address) as second,
    ):
        session = first.open_session()
        session.call([step(0)])
        announce_no_room(worker, server, Keys(setting.fleet.operator_key))
        with in_background(lambda: second.open_session().call([step(0)])) as work:
            time.sleep(0.5)
            assert not work.done()
            session.close()
            work.result(LATE)


def test_many_devices_at_once_find_workers(setting: Setting, server: Valkey) -> None:
    with contextlib.ExitStack() as stack:
        # None has room for more than its share.
        workers = [stack.enter_context(setting.worker(server.address, max_sessions=4)) for _ in range(3)]
        for _ in range(3):
            with contextlib.ExitStack() as round_:
                clients = [round_.enter_context(setting.client(server.address)) for _ in range(12)]
                with ThreadPoolExecutor(len(clients)) as pool:
                    list(pool.map(lambda client: client.open_session(), clients))
        # They do not all take the same one, though each decides for itself.
        assert all(worker.counters["channels"] > 0 for worker in workers)


def test_processes_of_one_worker_share_a_list_and_dead_ones_are_taken_off_it(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "CLEAN_UP", 1)
    client, list_ = server.client(), Keys(setting.fleet.operator_key).workers("worker-1")

    def listed() -> set[bytes]:
        return {worker.sender for worker in membership.read_list("worker-1", client.get(list_))[1]}

    dead = headers.Announce(new_peer_id("worker-1"), "worker", "worker-1", 0, [], setting.service, "dead", 5)
    certificate = setting.fleet.read_identity("worker-1").certificate_bytes
    client.set(list_, msgspec.msgpack.encode((certificate, [headers.encode_header(dead)])))
    with setting.client(server.address, patience=0) as device:
        with pytest.raises(NoWorker, match="served here: none"):
            device.open_session()
        with setting.worker(server.address) as one:
            with setting.worker(server.address) as other:
                wait_until(lambda: listed() == {one.id, other.id})
            wait_until(lambda: listed() == {one.id})


def test_an_announcement_is_kept_while_the_server_has_no_memory(setting: Setting, server: Valkey) -> None:
    client, list_ = server.client(), Keys(setting.fleet.operator_key).workers("worker-1")
    with setting.worker(server.address) as worker, setting.client(server.address) as device:
        client.config_set("maxmemory", "1mb")
        client.pexpire(list_, 20_000)
        wait_until(lambda: client.pttl(list_) > 50_000)
        client.config_set("maxmemory", "0")
        assert device.open_session().worker == worker.id


# --- bounds ------------------------------------------------------------------------------------------------


def test_a_full_lane_pushes_back_and_nothing_is_dropped(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "QUEUE_BYTES", 100_000)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        session = client.open_session()
        session.call([step(0)])
        reader, blocked = worker._transport._parts.reader, threading.Event()
        take = reader._take
        monkeypatch.setattr(reader, "_take", lambda fields: (blocked.wait(LATE), take(fields))[0])
        with in_background(lambda: session.call([step(1 + 30 * i, 30) for i in range(7)])) as work:
            time.sleep(0.2)
            padding = server.client()
            for _ in range(20):
                padding.xadd(
                    worker._transport._parts.lease.lane, {"h": b"junk", "b": bytes(10_000)}, nomkstream=True
                )
            registry, lane = client.transport._parts.registry, worker.id
            wait_until(lambda: not registry.takes(lane, 1))
            session.resend()
            wait_until(lambda: client.transport.counters["bounced_full"] > 0)
            blocked.set()
            assert len(work.result(LATE)) == 7
        wait_until(lambda: registry.takes(lane, 1))


def test_a_crowded_lane_takes_small_messages_and_no_large_ones() -> None:
    registry = Registry(None, Keys(bytes(32)), None, b"", Counter())  # type: ignore[arg-type]
    for size, small, large in (
        *((0, True, True), (CROWDED_BYTES, True, True), (CROWDED_BYTES + 1, True, False)),
        *((QUEUE_BYTES, True, False), (QUEUE_BYTES + 1, False, False)),
    ):
        registry.sizes = {b"worker": size}
        assert (registry.takes(b"worker", SMALL_BYTES), registry.takes(b"worker", SMALL_BYTES + 1)) == (
            small,
            large,
        )
        assert registry.takes(b"another", 2**24)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4096), ("bfloat16", 8192)])
def test_a_padded_decoding_step_is_a_small_message(dtype: Literal["float32", "bfloat16"], width: int) -> None:
    """In a crowded lane the next tokens are taken, also those of answers that speculate."""
    states = TOKENS * width * payloads.DTYPES[dtype]
    sizes: Any = {"size": states // TOKENS, "outputs": [0], "room": TOKENS, "padded": states}
    step = payloads.PaddedStep(dtype, width, [payloads.Run(0, 5, [5])], codec="exact", **sizes)
    body = encoding.encode_payload(step, bytes(states))
    # With a header, and what sealing adds.
    assert states < len(body) + 1024 <= SMALL_BYTES


def test_a_member_that_floods_a_lane_does_not_fill_the_server(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MAX_LANE", 1_000_000)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        session = client.open_session()
        session.call([step(0)])
        lane, reader = worker._transport._parts.lease.lane, worker._transport._parts.reader
        with monkeypatch.context() as patch:
            # However fast a worker reads, a member may be faster.
            patch.setattr(reader, "_read", lambda _: time.sleep(0.05))
            for _ in range(20):
                server.client().xadd(lane, {"h": b"junk", "b": bytes(100_000)}, nomkstream=True)
            wait_until(lambda: server.client().memory_usage(lane) < 100_000)
        session.call([step(1)])


def test_nothing_can_be_added_after_the_last_id_and_a_new_lane_is_made(setting: Setting, server: Valkey) -> None:
    """A member may choose the id of what it adds; after the largest there is none."""
    last = "18446744073709551615-18446744073709551615"
    with setting.worker(server.address) as worker, setting.client(server.address, timeout=20.0) as client:
        client.open_session().call([step(0)])
        for stream in (
            worker._transport._parts.lease.lane,
            client.transport._parts.lease.lane,
        ):
            server.client().xadd(stream, {"h": b"junk", "b": b""}, id=last)
            wait_until(lambda stream=stream: server.client().xinfo_stream(stream)["last-generated-id"] != last)
        assert len(run_steps(client, 5)) == 6
        with setting.client(server.address) as other:
            assert len(run_steps(other, 5)) == 6


def test_what_is_for_nobody_comes_back(setting: Setting, server: Valkey) -> None:
    class Peer:
        def __init__(self) -> None:
            self.id = new_peer_id("device-1")
            self.heard: list[Any] = []

        def announcement(self) -> headers.Announce:
            return headers.Announce(self.id, "device", "device-1")

        def on_message(self, header: Any, body: bytes) -> None:
            self.heard.append(header)

        def on_gone(self, peers: Any) -> None: ...

        def on_reset(self) -> None: ...

        def on_roster(self) -> None: ...

    peer, nobody = Peer(), new_peer_id("worker-1")
    link = connect(server.address, setting.fleet, setting.fleet.identity("device"))
    link.start(peer, LATE)
    try:
        link.send(headers.Relay(nobody, peer.id, headers.RelayKind.REQUEST, 3, 4, 0, 5), b"x")
        wait_until(lambda: peer.heard)
        bounce = peer.heard[0]
        assert (bounce.reason, bounce.channel, bounce.session, bounce.seq) == ("gone", 3, 4, 5)
        assert bounce.peer == nobody
    finally:
        link.close()
    assert server.client().keys("*{d:*") == []


def test_closing_is_prompt_and_leaves_no_thread(setting: Setting, server: Valkey) -> None:
    before = set(threading.enumerate())
    took: list[float] = []
    for _ in range(2):
        with setting.worker(server.address), setting.client(server.address) as client:
            client.open_session().call([step(0)])
            began = time.monotonic()
        took.append(time.monotonic() - began)
    # A busy machine may be late, but not both times.
    assert min(took) < 1.0
    wait_until(lambda: set(threading.enumerate()) <= before)
