"""What the tests of the queue share: a fleet of one's own, peers that say what they like, a broker that cheats."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
import zmq

from split_broker.broker import Broker
from split_broker.peer_queue import Peer, RoutedMessage
from split_common.models.loading import read_spec
from split_common.models.split import Split
from split_common.models.tensors import to_bytes
from split_common.models.verification import build_manifest
from split_common.protocol import headers, payloads
from split_common.transport import connect, new_peer_id
from split_common.transport.zmq_socket import curve_client
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity
from split_device.sessions.client import Client
from split_device.sessions.session import RemoteSession
from split_worker.bodies.loading import load_language_body
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker

_T = TypeVar("_T")

SPLIT = Split.parse(6, "2:-2")
WIDTH = 32

#: Seconds after which what is waited for will not come: a bound on a hang, many times what anything takes.
LATE = 300.0

#: Seconds within which something comes that otherwise one of the product's limits, a minute each, would bring.
SOON = 50.0


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All requests that sessions of this process send from now on."""
    sent: list[Any] = []
    call = RemoteSession.call

    def recording(self: RemoteSession, requests: Any, timings: Any = None) -> Any:
        sent.extend(request for request, _ in requests)
        return call(self, requests, timings)

    monkeypatch.setattr(RemoteSession, "call", recording)
    return sent


def record_waits(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What each session of this process has in flight whenever it waits for an answer from now on.

    Each time the sequence numbers: those that are waited for together take one trip.
    """
    waits: list[list[int]] = []
    wait = RemoteSession._next_event

    def recording(self: RemoteSession, *arguments: Any) -> Any:
        waits.append(sorted(self.in_flight))
        return wait(self, *arguments)

    monkeypatch.setattr(RemoteSession, "_next_event", recording)
    return waits


def wait_until(condition: Callable[[], Any], timeout: float = LATE) -> float:
    """Waits until `condition` holds; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "it did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - began


class Setting:
    """A fleet of its own, with the tiny model's manifest in it, and what to start of it."""

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        self.fleet = Fleet.create(directory / "keys")
        self.checkpoint = checkpoint
        self.spec = read_spec(str(checkpoint))
        self.manifest = build_manifest(self.spec.checkpoint)
        self.fleet.add_manifest(self.manifest)
        self.service = headers.Service(self.manifest.root, SPLIT.first, SPLIT.last)
        self.body = load_language_body(self.spec, SPLIT, torch.device("cpu"), kv_bytes=64 * 1024**2)

    def own_fleet(self) -> Fleet:
        """The fleet as another process has it."""
        return Fleet.open(self.fleet.path)

    @contextlib.contextmanager
    def broker(self, address: str = "tcp://127.0.0.1:*") -> Iterator[Broker]:
        broker = Broker(address, self.own_fleet())
        broker.start()
        try:
            yield broker
        finally:
            broker.stop()

    @contextlib.contextmanager
    def worker(
        self, broker: str, member: str = "worker-1", service: headers.Service | None = None, **limits: Any
    ) -> Iterator[Worker]:
        fleet = self.own_fleet()
        identity = fleet.read_identity(member)
        transport = connect(broker, fleet, identity)
        service = service or self.service
        worker = Worker(self.body, service, self.manifest.name, identity, fleet, transport, WorkerLimits(**limits))
        worker.start()
        try:
            yield worker
        finally:
            worker.stop()

    @contextlib.contextmanager
    def client(
        self, broker: str, member: str = "device-1", service: headers.Service | None = None, **options: Any
    ) -> Iterator[Client]:
        fleet = self.own_fleet()
        identity = fleet.read_identity(member)
        transport = connect(broker, fleet, identity)
        service = service or self.service
        client = Client(transport, fleet, identity, service, self.manifest.name, "float32", **options)
        client.start()
        try:
            yield client
        finally:
            client.close()


def step(start: int, tokens: int = 1, seed: int = 0) -> tuple[payloads.Step, memoryview]:
    """A step of one row, and its hidden states: always the same for the same arguments."""
    generator = torch.Generator().manual_seed(1000 * seed + start)
    states = torch.randn(tokens, WIDTH, generator=generator)
    rows = [payloads.Run(0, start, list(range(start, start + tokens)))]
    return payloads.Step("float32", WIDTH, rows), to_bytes(states)


class States(bytes):
    """Hidden states in fp32: equal to others up to rounding, which depends on who shared the forward."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes) or len(other) != len(self):
            return False
        ours, theirs = (torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (self, other))
        return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)

    __hash__ = None  # type: ignore[assignment]


def run_steps(client: Client, count: int, seed: int = 0, session: Any = None) -> list[bytes]:
    """The body's answers to a prefill and `count` tokens, in a session of their own."""
    session = session or client.open_session()
    answers = [session.call([step(0, 7, seed)])]
    answers += [session.call([step(7 + i, 1, seed)]) for i in range(count)]
    session.close()
    return [States(tensor) for ((_, tensor),) in answers]


class FakePeer:
    """A socket of a member of the fleet that sends what it is told to, and no heartbeats by itself."""

    def __init__(self, address: str, fleet: Fleet, identity: Identity, id_: bytes | None = None) -> None:
        self.role = identity.certificate.role
        self.member = identity.certificate.name
        self.certificate = identity.certificate_bytes
        self.id = id_ or new_peer_id(self.member)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        # However slow the machine, nothing is left out because too much waits.
        self.socket.sndhwm = 0
        # Where it is refused at the door, nothing can be sent.
        self.socket.sndtimeo = 500
        if address.startswith("tcp://"):
            curve_client(self.socket, fleet, identity)
        self.socket.connect(address)

    def __enter__(self) -> FakePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([headers.encode_header(header), body])

    def announce(self, **fields: Any) -> None:
        known = {"sender": self.id, "role": self.role, "member": self.member}
        self.send(headers.Announce(**{**known, **fields}), self.certificate)

    def receive(self, kind: Any, timeout: float = LATE) -> tuple[Any, bytes]:
        """The next message of a kind; others are skipped."""
        deadline = time.monotonic() + timeout
        while self.socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            head, body = self.socket.recv_multipart()
            header = headers.decode_header(head)
            if isinstance(header, kind):
                return header, body
        raise TimeoutError(f"no {kind} came")

    def silent(self, kind: Any, timeout: float = 0.3) -> bool:
        """Whether no message of a kind comes."""
        try:
            self.receive(kind, timeout)
        except TimeoutError:
            return True
        return False

    def join(self, **fields: Any) -> headers.Welcome:
        self.announce(**fields)
        welcome: headers.Welcome = self.receive(headers.Welcome)[0]
        return welcome


class FakeTransport:
    """A transport that keeps what is sent, for handlers whose `on_message` is called by hand."""

    alive = True
    sending = False

    def __init__(self) -> None:
        self.sent: list[tuple[headers.Header, bytes]] = []
        self.counters: Counter[str] = Counter()

    def start(self, handler: Any, timeout: float) -> None: ...

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        self.sent.append((header, body))

    def announce(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> list[tuple[headers.Header, bytes]]:
        sent, self.sent = self.sent, []
        return sent


def cheat(broker: Broker, change: Callable[[Peer, headers.AnyHeader, RoutedMessage], list[RoutedMessage]]) -> None:
    """Makes a broker deliver what `change` makes of each message, instead of the message."""
    deliver = broker._delivery.put

    def put(peer: Peer, message: RoutedMessage, sender: str = "") -> bool:
        head, body = message[0], bytes(memoryview(message[1]))  # type: ignore[arg-type]
        delivered = [deliver(peer, one, sender) for one in change(peer, headers.decode_header(head), (head, body))]
        return all(delivered)

    broker._delivery.put = put  # type: ignore[method-assign]


def changed(header: headers.Header, **fields: Any) -> bytes:
    """A header with some fields changed, encoded."""
    return headers.encode_header(msgspec.structs.replace(header, **fields))


def on_loop(broker: Broker, call: Callable[[], object]) -> None:
    """Runs something on the broker's own thread, which alone may use its socket."""
    done = threading.Event()
    housekeeping = broker._housekeeping

    def once(now: float) -> None:
        broker._housekeeping = housekeeping  # type: ignore[method-assign]
        call()
        done.set()
        housekeeping(now)

    broker._housekeeping = once  # type: ignore[method-assign]
    assert done.wait(LATE)


@contextlib.contextmanager
def in_background(call: Callable[[], _T]) -> Iterator[Future[_T]]:
    """Calls a function on a thread of its own. Waits for it at the end of the `with` block."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def slowly(worker: Worker, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes each forward of a worker take so long."""
    launch = worker._compute._launch

    def wait_and_launch(batch: Any) -> Any:
        time.sleep(seconds)
        return launch(batch)

    monkeypatch.setattr(worker._compute, "_launch", wait_and_launch)
