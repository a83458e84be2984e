"""Whatever stands in the streams: refused and counted. Nothing fails or stalls, and nothing more is computed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import tiny
from split_common.errors import NoWorker, SplitError
from split_common.protocol import headers
from split_common.protocol.handshake import WorkerHandshake
from split_common.transport import new_peer_id
from split_common.transport.placement import Candidate
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.opens import two_of_each
from split_common.trust.keys import ModelScope
from valkeys import Valkey, running_valkey
from wiretap import LATE, Setting, run_steps, step, wait_until

STEPS = 40
#: Entries that are put into each of the streams.
ENTRIES = 4000

Fields = dict[bytes, bytes]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    own = Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))
    own.fleet.add_member("worker", "worker-2")
    return own


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running_valkey() as running:
        yield running


def recorded(link: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """The messages that a link reads from now on."""
    seen: list[tuple[bytes, bytes]] = []
    parts = link._parts
    take = parts._take

    def record(fields: Any) -> None:
        if len(fields) == 4:
            seen.append((fields[1], fields[3]))
        take(fields)

    monkeypatch.setattr(parts.reader, "_take", record)
    return seen


class Spoiler:
    """Makes bad entries of good messages."""

    def __init__(self, good: list[tuple[bytes, bytes]], seed: int) -> None:
        self.random = random.Random(seed)
        self.good = good
        self.kinds: Counter[str] = Counter()

    def entry(self) -> Fields:
        kind = self.random.choice(
            ["flip head", "flip body", "cut head", "cut body", "replay", "foreign", "broker", "fields", "noise"]
        )
        self.kinds[kind] += 1
        head, body = self.random.choice(self.good)
        match kind:
            case "flip head":
                head = self._flipped(head)
            case "flip body":
                body = self._flipped(body)
            case "cut head":
                head = head[: self.random.randrange(len(head))]
            case "cut body":
                body = body[: self.random.randrange(len(body) or 1)]
            case "foreign":
                header = headers.decode_header(head)
                if isinstance(header, headers.Relay):
                    field = self.random.choice(["to", "sender", "channel", "session", "epoch", "seq", "counter"])
                    value = new_peer_id("x") if field in ("to", "sender") else self.random.randrange(2**62)
                    head = headers.encode_header(msgspec.structs.replace(header, **{field: value}))
            case "broker":
                gone = [header.sender for header in map(headers.decode_header, [head]) if hasattr(header, "sender")]
                head = headers.encode_header(
                    self.random.choice(
                        [
                            headers.Welcome(bytes(8), 99, gone),
                            headers.Probe(),
                            headers.RosterReply(),
                            headers.Bounce("gone", 1, 1, 0),
                            headers.Bounce("no-worker", 1),
                            headers.Announce(bytes(8), "worker", "worker-1", leaving=True),
                        ]
                    )
                )
            case "fields":
                return self.random.choice([{b"h": head}, {b"b": body, b"h": head}, {b"x": b"", b"y": b""}])
            case "noise":
                head, body = self.random.randbytes(self.random.randrange(200)), self.random.randbytes(100)
        return {b"h": head, b"b": body}

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)


def flood(server: Valkey, stream: str, entries: Callable[[], Fields]) -> None:
    client = server.client()
    for _ in range(ENTRIES // 100):
        pipeline = client.pipeline(transaction=False)
        for _ in range(100):
            pipeline.xadd(stream, entries())  # type: ignore[arg-type]
        pipeline.execute()


@pytest.mark.parametrize("victim", ["worker", "device"])
def test_thousands_of_bad_entries_change_nothing(
    setting: Setting, server: Valkey, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        links = {"worker": worker._transport, "device": client.transport}
        link: Any = links[victim]
        good = recorded(link, monkeypatch)
        expected = run_steps(client, STEPS)
        with setting.client(server.address) as other:
            other.open_session().call([step(0)])
        steps = worker.counters["steps"]
        spoiler = Spoiler(list(good), seed=len(victim))
        stream = link._parts.lease.lane
        received = link.counters["messages_received"]
        with ThreadPoolExecutor(2) as pool:
            flooding = pool.submit(flood, server, stream, spoiler.entry)
            assert pool.submit(run_steps, client, STEPS).result(LATE) == expected
            flooding.result(LATE)
        assert len(spoiler.kinds) == 9
        wait_until(lambda: server.client().xlen(stream) == 0)
        assert run_steps(client, STEPS) == expected
        assert worker.counters["steps"] == steps + 2 * (STEPS + 1)
        counters = link.counters + client.counters
        assert counters["HandlerError"] == counters["failures"] == 0
        dropped = sum(counters[error.__name__] for error in all_errors())
        read = link.counters["messages_received"] - received
        # All but replays, and what differs from the message only where nothing looks at it.
        assert dropped / read > 0.5 - spoiler.kinds["replay"] / ENTRIES
        assert read > ENTRIES / 2


def all_errors() -> list[type[SplitError]]:
    found = [SplitError]
    for error in found:
        found += error.__subclasses__()
    return found


def test_an_entry_above_the_limit_is_refused(setting: Setting, server: Valkey) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        expected = run_steps(client, 5)
        link: Any = worker._transport
        for head, body in (
            (b"\x01" + bytes(headers.MAX_HEADER), b""),
            (b"\x01\x91\x03", bytes(headers.MAX_BODY + 1)),
        ):
            server.client().xadd(link._parts.lease.lane, {"h": head, "b": body})
        wait_until(lambda: link.counters["Oversized"] == 2)
        assert run_steps(client, 5) == expected


def bait(setting: Setting, member: str) -> headers.Announce:
    """The announcement of a worker that claims to have room for everybody."""
    return headers.Announce(
        new_peer_id(member), "worker", member, service=setting.service, model="bait", room=2**61
    )


def listed(setting: Setting, *entries: headers.Header | bytes, member: str = "worker-2") -> bytes:
    certificate = setting.fleet.read_identity(member).certificate_bytes
    return msgspec.msgpack.encode(
        (certificate, [entry if isinstance(entry, bytes) else headers.encode_header(entry) for entry in entries])
    )


def test_a_list_of_workers_that_lies_stalls_no_device(setting: Setting, server: Valkey) -> None:
    """Workers that are dead, of another member, things that are no announcements, and a list without end."""
    keys, client = Keys(setting.fleet.operator_key), server.client()
    liar = keys.workers("worker-2")
    with setting.worker(server.address) as worker:
        for data in (
            listed(setting, *(bait(setting, "worker-2") for _ in range(100))),
            listed(setting, msgspec.structs.replace(bait(setting, "worker-2"), sender=worker.id)),
            listed(setting, msgspec.structs.replace(bait(setting, "worker-2"), role="device")),
            listed(setting, b"x", bait(setting, "worker-2")),
            b"x" * 100,
            msgspec.msgpack.encode({"a": 1}),
            b"\xc4" * 2**22,
        ):
            client.set(liar, data)
            with setting.client(server.address) as device:
                session = device.open_session()
                session.call([step(0)])
                assert session.worker == worker.id
                assert device.counters["HandlerError"] == device.transport.counters["failures"] == 0
        client.set(keys.workers("worker-1"), b"junk of another process of the worker")
        worker._transport.announce()
        wait_until(lambda: b"junk" not in client.get(keys.workers("worker-1")))
    client.delete(liar)


def test_a_member_that_answers_no_open_keeps_no_device_from_the_others(setting: Setting, server: Valkey) -> None:
    """It claims all the room there is, in many processes whose lanes are there; but nobody answers."""
    keys, client = Keys(setting.fleet.operator_key), server.client()
    baits = [bait(setting, "worker-2") for _ in range(8)]
    lanes = [keys.lane("worker", announce.sender) for announce in baits]
    for lane in lanes:
        client.xadd(lane, {"h": b"", "b": b""})
    client.set(keys.workers("worker-2"), listed(setting, *baits))
    try:
        with setting.worker(server.address) as worker, setting.client(server.address, patience=0) as device:
            for _ in range(3):
                session = device.open_session()
                session.call([step(0)])
                assert session.worker == worker.id
                device._lose(lambda _: True)
            # Of the first set-up. Later ones know better.
            assert sum(client.xlen(lane) for lane in lanes) <= len(lanes) + 1
    finally:
        client.delete(*lanes, keys.workers("worker-2"))


@pytest.mark.long
@pytest.mark.parametrize("shown", ["worker-2", "elsewhere"])
def test_an_answer_under_anothers_id_spoils_no_set_up(
    setting: Setting, server: Valkey, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """A worker that is asked answers as if it were the other: with its own certificate, or one for other layers."""
    if setting.fleet.roster().by_name("elsewhere") is None:
        setting.fleet.add_member("worker", "elsewhere", [ModelScope(bytes(32), 0, 99)])
    identity = setting.fleet.read_identity(shown)
    lies: list[bytes] = []
    with setting.worker(server.address) as good, setting.worker(server.address, "worker-2") as liar:

        def answer(header: headers.Open, body: bytes) -> None:
            handshake = WorkerHandshake(identity, liar._verify, setting.service, body)
            relay = headers.Relay(header.sender, good.id, headers.RelayKind.ANSWER, header.channel)
            liar._transport.send(relay, handshake.answer)
            lies.append(header.sender)

        monkeypatch.setattr(liar, "_open_channel", answer)
        while not lies:
            with setting.client(server.address, patience=0, timeout=LATE) as device:
                assert device.open_session().worker == good.id
        wait_until(lambda: device.counters["AuthenticationError"] >= 1)
    # What the worker leaves for the lease of its list.
    keys = Keys(setting.fleet.operator_key)
    server.client().delete(keys.workers("worker-2"), keys.roster_copy("worker-2"))


def test_workers_without_a_certificate_for_their_service_get_no_open(setting: Setting, server: Valkey) -> None:
    keys, client = Keys(setting.fleet.operator_key), server.client()
    if setting.fleet.roster().by_name("worker-3") is None:
        setting.fleet.add_member("worker", "worker-3", [ModelScope(setting.service.root, 0, 1)])
    narrow = bait(setting, "worker-3")
    lists = {
        # Of other layers, another member's, and none.
        "worker-3": listed(setting, narrow, member="worker-3"),
        "worker-2": listed(setting, bait(setting, "worker-2"), member="worker-1"),
        "worker-1": msgspec.msgpack.encode((b"", [headers.encode_header(bait(setting, "worker-1"))])),
    }
    lane = keys.lane("worker", narrow.sender)
    client.xadd(lane, {"h": b"", "b": b""})
    for member, data in lists.items():
        client.set(keys.workers(member), data)
    with setting.client(server.address, patience=0) as device:
        with pytest.raises(NoWorker, match="does not cover layers 2:4"):
            device.open_session()
        with setting.worker(server.address) as worker:
            assert device.open_session().worker == worker.id
    assert client.xlen(lane) == 1
    client.delete(lane, *(keys.workers(member) for member in lists))


def test_who_has_nobody_else_asks_again_who_did_not_answer(setting: Setting, server: Valkey) -> None:
    with setting.worker(server.address) as worker, setting.client(server.address, patience=0) as device:
        taken = []
        take = worker.on_message

        def lose_the_first(header: Any, body: bytes) -> None:
            taken.append(header)
            if len(taken) > 1:
                take(header, body)

        worker._transport._parts._caller._handler = SimpleNamespace(
            on_message=lose_the_first,
            announcement=worker.announcement,
            on_gone=worker.on_gone,
            on_reset=worker.on_reset,
            on_roster=worker.on_roster,
        )
        device.open_session().call([step(0)])
        assert [type(header) for header in taken[:2]] == [headers.Open, headers.Open]


def test_keys_of_another_type_are_no_stall(setting: Setting, server: Valkey) -> None:
    """As a server has them that is used for something else, too."""
    keys, client = Keys(setting.fleet.operator_key), server.client()
    client.lpush(keys.workers("worker-2"), b"no string")
    client.lpush(keys.roster_copy("worker-2"), b"no string")
    with setting.client(server.address, patience=0) as device:
        with pytest.raises(NoWorker):
            device.open_session()
        with setting.worker(server.address):
            device.open_session().call([step(0)])
    client.delete(keys.workers("worker-2"), keys.roster_copy("worker-2"))
    assert threading.active_count() < 50


def test_workers_of_an_older_version_are_refused_by_name(setting: Setting, server: Valkey) -> None:
    keys, client = Keys(setting.fleet.operator_key), server.client()
    client.hset(keys.old_workers, "00" * 8, b"")
    with setting.client(server.address, patience=0) as device, pytest.raises(NoWorker, match="older version"):
        device.open_session()
    client.delete(keys.old_workers)


def test_two_workers_with_room_stay_of_each_member_and_service() -> None:
    one, other = headers.Service(bytes(32), 0, 1), headers.Service(bytes(32), 1, 2)
    workers = [
        Candidate(bytes([number]), service, "model", room, member)
        for number, (member, service, room) in enumerate(
            [
                *[("a", one, 4)] * 5,
                *[("a", other, 4)] * 5,
                *[("b", one, 4)],
                *[("b", one, 0)] * 3,
                *[("c", one, 1)] * 2,
            ]
        )
    ]
    avoided = workers[0].id
    for _ in range(100):
        kept = two_of_each(workers, [avoided])
        usable = Counter((w.member, w.service) for w in kept if w.room and w.id != avoided)
        assert usable == {("a", one): 2, ("a", other): 2, ("b", one): 1, ("c", one): 2}
        assert sum(not worker.room for worker in kept) == 3
        assert avoided in [worker.id for worker in kept]
