"""Whatever stands in the streams: refused and counted. Nothing fails or stalls, and nothing more is computed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

import tiny
from split_common.errors import SplitError
from split_common.protocol import headers
from split_common.transport import new_peer_id
from split_common.transport.redis import opens
from split_common.transport.redis.key_names import GROUP, Keys
from valkeys import Valkey, running_valkey
from wiretap import LATE, Setting, run_steps, step, wait_until

STEPS = 40
#: Entries that are put into each of the streams.
ENTRIES = 4000

Fields = dict[bytes, bytes]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


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
    if parts.worker_opens is not None:
        monkeypatch.setattr(parts.worker_opens, "_take", record)
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


@pytest.mark.parametrize("victim", ["worker", "device", "opens"])
def test_thousands_of_bad_entries_change_nothing(
    setting: Setting, server: Valkey, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, what is late is not removed unread either.
    monkeypatch.setattr(opens, "OPEN_PATIENCE", 600.0)
    keys = Keys(setting.fleet.operator_key)
    with setting.worker(server.address) as worker, setting.client(server.address) as client:
        links = {"worker": worker._transport, "device": client.transport, "opens": worker._transport}
        link: Any = links[victim]
        good = recorded(link, monkeypatch)
        expected = run_steps(client, STEPS)
        with setting.client(server.address) as other:
            other.open_session().call([step(0)])
        steps = worker.counters["steps"]
        spoiler = Spoiler(list(good), seed=len(victim))
        stream = keys.opens(setting.service) if victim == "opens" else link._parts.lease.lane
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
        # Opens that no worker has read in time are dropped unread: how many depends on the machine.
        assert read > (0 if victim == "opens" else ENTRIES / 2)
    if victim == "opens":
        assert server.client().xpending(stream, GROUP)["pending"] == 0


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


def test_a_list_of_workers_that_lies_stalls_no_device(setting: Setting, server: Valkey) -> None:
    """Entries of the dead, of nobody, under another's name, and things that are no announcements."""
    keys, client = Keys(setting.fleet.operator_key), server.client()
    with setting.worker(server.address) as worker:
        for number in range(200):
            liar = new_peer_id(f"worker-{number}")
            announce = headers.Announce(
                liar, "worker", "worker-1", service=setting.service, model="bait", room=10_000
            )
            name = liar.hex() if number % 3 else new_peer_id("x").hex()
            client.hset(keys.workers, name, headers.encode_header(announce)[: None if number % 2 else -1])
        with setting.client(server.address) as device:
            session = device.open_session()
            session.call([step(0)])
            assert session.worker == worker.id
            assert device.transport.counters["Malformed"] > 0


def test_a_stream_of_another_type_is_no_stall(setting: Setting, server: Valkey) -> None:
    """As a server has it that is used for something else, too."""
    keys = Keys(setting.fleet.operator_key)
    with setting.client(server.address, patience=0) as device:
        server.client().set(keys.workers, b"no hash")
        device.timeout, patient = 3.0, device.timeout
        with pytest.raises(SplitError):
            device.open_session()
        device.timeout = patient
        server.client().delete(keys.workers)
        with setting.worker(server.address):
            device.open_session().call([step(0)])
    assert threading.active_count() < 50
