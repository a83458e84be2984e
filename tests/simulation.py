"""A world of one thread: the product's own device, worker and broker, on a simulated network and a virtual clock.

Nothing of what decides is imitated: only the sockets, the threads, the time and the model's layers are. What
happens follows from a seed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zmq

from split_broker import broker as broker_module
from split_broker import peer_queue as peer_queue_module
from split_broker import under_way as under_way_module
from split_broker.access import Authentication
from split_broker.broker import Broker
from split_broker.delivery import Delivery
from split_broker.memory import MEMORY_LIMIT
from split_broker.opens import Opens
from split_broker.quotas import Rates
from split_common.engine import forward_times as forward_times_module
from split_common.engine import pool as pool_module
from split_common.engine import scheduler as scheduler_module
from split_common.engine.forward import Forward
from split_common.engine.pool import LayerShape, PagePool
from split_common.engine.sequences import TokenRun
from split_common.protocol import channel as channel_module
from split_common.protocol import headers
from split_common.transport import HEARTBEAT, peer_id
from split_common.transport import zmq_link as link_module
from split_common.transport.supervised import Supervisor, handled
from split_common.transport.zmq_link import ZmqLink
from split_common.trust import shares as shares_module
from split_common.trust.fleet import Fleet
from split_device.sessions import channels as channels_module
from split_device.sessions import chunks
from split_device.sessions import client as client_module
from split_device.sessions import history as history_module
from split_device.sessions import resilient as resilient_module
from split_device.sessions import session as session_module
from split_device.sessions.client import Client
from split_worker import channels as worker_channels_module
from split_worker import compute as compute_module
from split_worker import repeats as repeats_module
from split_worker import sessions as sessions_module
from split_worker import set_ups as set_ups_module
from split_worker import watchdog as watchdog_module
from split_worker import worker as worker_module
from split_worker.bodies.language import LanguageBody
from split_worker.compute import Batch, ComputeLoop
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker

#: What the layers compute with: integers, exact in float32.
PRIME = 8191

#: Seconds after which a sequence must have ended.
LIFETIME = 1200.0

SERVICE = headers.Service(bytes(32), 1, 3)


class Clock:
    """Stands for the module `time` in the product's own modules."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.wait: Callable[[float], None] = lambda _: None

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        self.wait(self.now + seconds)


class Layers:
    """The body of a model whose every output tells all that the row was given, and in which order.

    Keys are kept in the product's own pages, so that a page that is shared, copied or freed wrongly shows.
    """

    width = 1
    device = torch.device("cpu")
    dtype = torch.float32
    max_positions = 4096
    positions_interact = False
    padding_matters = indivisible = False
    divisible = True
    layers = SimpleNamespace(stack=SimpleNamespace(position_axes=1, has_spans=False))

    def __init__(self, pages: int, asynchronous: bool, takes_trees: bool) -> None:
        self.asynchronous, self.takes_trees = asynchronous, takes_trees
        self.fails = False
        self.store = PagePool({0: LayerShape(1, 1, 1)}, pages, torch.float32)
        self._keys = self.store.layers[0][0].view(-1).numpy()
        self._keys[:] = float("nan")

    def launch(self, runs: list[TokenRun[Any]]) -> Forward:
        outputs = []
        if self.fails:
            self.fails = False
            raise RuntimeError("a kernel failed")
        for run in runs:
            run.settle()
            row = run.sequence
            count = run.cost
            new = row.append(count)
            self._keys[new] = mixed(run.states.view(-1).numpy(), np.asarray(run.positions))
            outputs.append(torch.from_numpy(outcomes(self._keys[row.slots()], count, run.parents)).view(count, 1))
        return Forward(torch.cat(outputs), [len(output) for output in outputs])


def mixed(states: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (states + 31 * positions) % PRIME


def outcome(keys: np.ndarray, count: int) -> np.ndarray:
    """The outputs of the last tokens of a row with these keys."""
    summed = np.cumsum(keys.astype(np.int64) * np.arange(1, len(keys) + 1)) % PRIME
    return summed[len(keys) - count :].astype(np.float32)


def outcomes(keys: np.ndarray, count: int, parents: Sequence[int]) -> np.ndarray:
    """As `outcome`; if the tokens are a tree, each output is that of a row with the path to its token alone."""
    if not parents:
        return outcome(keys, count)
    past, new = keys[: len(keys) - count], keys[len(keys) - count :]
    return np.concatenate([outcome(np.concatenate([past, new[path_to(parents, at)]]), 1) for at in range(count)])


def path_to(parents: Sequence[int], token: int) -> list[int]:
    """A token of a tree, after all of its ancestors."""
    path: list[int] = []
    while token >= 0:
        path.insert(0, token)
        token = parents[token]
    return path


class Mailbox:
    """A queue whose reader lets the world go on while it waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._items: list[Any] = []

    def put(self, item: Any) -> None:
        self._items.append(item)

    def empty(self) -> bool:
        return not self._items

    def get(self, timeout: float) -> Any:
        self._world.run(self._world.clock.now + timeout, lambda: bool(self._items))
        if not self._items:
            raise queue.Empty
        return self._items.pop(0)


class Queues:
    """Stands for the module `queue` where a device waits."""

    Empty = queue.Empty

    def __init__(self, world: World) -> None:
        self.SimpleQueue = lambda: Mailbox(world)


class Socket:
    """A socket of a simulated process; `send` is what becomes of its messages."""

    def __init__(self, send: Callable[[list[bytes]], None]) -> None:
        self._send = send

        self._frames: list[bytes] = []

    def send(self, frame: bytes, flags: int, **_: Any) -> None:
        self._frames.append(frame)
        if not flags & zmq.SNDMORE:
            frames, self._frames = self._frames, []
            self._send(frames)

    def get(self, _option: int) -> int:
        """Nothing happens to it that the world does not know of."""
        return 0


class Envelope:
    """The routing frame of a message, or its header, as the broker gets it."""

    def __init__(self, frame: bytes) -> None:
        self.bytes = frame


class Link(ZmqLink):
    """A peer's link without a thread: the world calls it."""

    def __init__(self, world: World, member: str) -> None:  # the parent's would open sockets
        self.world = world
        self.member = member
        self.up = True
        self.frozen = False
        #: Until then nothing passes between it and the broker.
        self.cut_until = 0.0
        #: When the last of its messages, in either direction, arrives.
        self.arrival = 0.0
        self._fleet = world.fleet
        self._identity = world.fleet.read_identity(member)
        self._roster_version = world.fleet.roster().version
        self._sock = None
        self._turn = link_module.threading.Lock()
        self._handed, self._unsent = link_module.deque(), link_module.deque()
        self._unsent_bytes = self._received = self._credited = 0
        self._heard = self._next_reset = 0.0
        self._moved, self._progress = -math.inf, link_module.Progress()
        self._sender, self._boot = bytes(8), None
        self._announce_now = self._announced = False
        self._welcomed = link_module.threading.Event()
        self._socket: Any = Socket(lambda frames: world.to_broker(self, frames))
        self.counters: Counter[str] = Counter()
        self.route = world.new_route()

    def join(self, handler: Any) -> None:
        self._handler = handler
        self.world.links[self.route] = self
        self._beat()

    def start(self, handler: Any, timeout: float) -> None:
        self.join(handler)
        self.world.run(self.world.clock.now + timeout, self._welcomed.is_set)
        assert self._welcomed.is_set()

    def _beat(self) -> None:
        if self.up:
            self._announce_now = True
            self._pump()
            self.world.after(HEARTBEAT, self._beat)

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        super().send(header, body)
        self._wake()

    def receive(self, events: Any, timeout: float) -> Any:
        return events.get(timeout=timeout)

    def _wake(self) -> None:
        self.world.after(0.0, self._pump)

    def _pump(self) -> None:
        if not self.up or self.frozen:
            return
        if self._announce_now:
            self._announce_now = False
            self._send_announcement(self._socket)
        self._flush(self._socket)

    def close(self) -> None:
        if self.up:
            self._flush(self._socket)
            self._send_announcement(self._socket, leaving=True)
            self.up = False

    def reconnect(self) -> None:
        self.world.links.pop(self.route, None)
        self.route = self.world.new_route()
        self.world.links[self.route] = self
        self._announce_now = True
        self._wake()

    def deliver(self, frames: list[bytes]) -> None:
        if not self.up:
            return
        if self.frozen:
            # It lies in the socket until the process goes on.
            self.world.after(0.5, lambda: self.deliver(frames))
            return
        self._received += len(frames[1])
        handled(self.counters, self._dispatch, frames)


class SimulatedRouter:
    """The broker's socket; none of its connections holds anything."""

    def __init__(self, send: Callable[[list[bytes]], None]) -> None:
        self.send = lambda route, message: send([route, *message])
        self.look = self.announced = self.left = lambda *_: None
        self.unsent = lambda *_: 0
        self.last_sign = lambda _route, seen, _now: seen
        self.connections = self


class SimulatedBroker(Broker):
    """The broker without its socket and thread."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._fleet = world.fleet
        self._started = world.clock.now
        self._enforced = world.fleet.roster().version
        self._rates = Rates()
        self.counters: Counter[str] = Counter()
        self._authentication = Authentication(self._fleet, self.counters)
        self._router: Any = SimulatedRouter(self._out)
        self._delivery = Delivery(self._router, self._fleet, self.counters, MEMORY_LIMIT, self._gone)
        self._opens = Opens(self._delivery, self._authentication.turned_away, world.random)
        self._peers, self._routes = self._delivery.peers, self._delivery.routes
        self._supervisor = Supervisor("the broker", self.counters, threading.Event(), pause=0.0)
        self.up = True
        self._tick()

    def _out(self, frames: list[bytes]) -> None:
        link = self._world.links.get(frames[0])
        if link is None or not link.up:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._world.travel(link, lambda: link.deliver(frames[1:]))

    def take(self, route: bytes, frames: list[bytes]) -> None:
        if self.up:
            self._supervisor.run(self._take, [Envelope(route), Envelope(frames[0]), *frames[1:]])  # type: ignore[list-item]

    def _tick(self) -> None:
        if self.up:
            self._supervisor.run(self._housekeeping, self._world.clock.now)
            self._world.after(broker_module.PROBE_INTERVAL, self._tick)


class Compute(ComputeLoop):
    """The compute loop without its thread: a turn is an event."""

    world: World
    link: Link
    scheduled = False
    under_way: Batch | None = None
    #: Seconds that the next turn hangs.
    hangs = 0.0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def put(self, task: Any) -> None:
        super().put(task)
        self._soon()

    def wake(self) -> None:
        super().wake()
        self._soon()

    def _soon(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self.world.after(self.world.random.uniform(0.001, 0.03), self._turn)

    def _turn(self) -> None:
        if not self.link.up:
            return
        if self.link.frozen or (self.hangs and self.under_way is None):
            if self.hangs:
                self._watchdog.begin(1)
            self.world.after(self.hangs or 0.5, self._go_on if self.hangs else self._turn)
            self.hangs = 0.0
            return
        self.scheduled = False
        if not self._inbox.empty() or not self._scheduler.idle or self.under_way is not None:
            self.under_way = self.turn(self.under_way)
        if not self._scheduler.idle or self.under_way is not None:
            self._soon()

    def _go_on(self) -> None:
        self._watchdog.end()
        self._turn()


class World:
    """Everything there is. Built once for each sequence of events."""

    def __init__(self, fleet: Fleet, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.fleet = fleet
        self.random = random.Random(seed)
        self.clock = Clock()
        self.clock.wait = lambda until: self.run(until)
        self.began = self.clock.now
        #: Steps of trees that were computed.
        self.trees = 0
        #: What devices and workers counted, at the end.
        self.counters: Counter[str] = Counter()
        self._may_fail = True
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._routes = itertools.count()
        self.links: dict[bytes, Link] = {}
        self.workers: list[Worker] = []
        self.loss = self.random.choice([0.0, 0.0, 0.02, 0.05])
        self.repeats = self.random.choice([0.0, 0.05, 0.3])
        self.disorder = self.random.choice([0.0, 0.0, 0.05])
        self.lag = self.random.choice([0.001, 0.01, 0.1])
        self.pages = self.random.choice([16, 16, 200])
        #: Whether workers answer a forward while the next one runs, as on CUDA.
        self.asynchronous = self.random.random() < 0.3
        self.sealed: set[tuple[bytes, int]] = set()
        self._patch(patch)
        self.broker = SimulatedBroker(self)

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        timed = (
            channels_module,
            session_module,
            resilient_module,
            worker_channels_module,
            set_ups_module,
            repeats_module,
            shares_module,
            worker_module,
            sessions_module,
            compute_module,
        )
        for module in (
            *timed,
            watchdog_module,
            channel_module,
            link_module,
            scheduler_module,
            forward_times_module,
            broker_module,
            peer_queue_module,
            under_way_module,
            shares_module,
        ):
            patch.setattr(module, "time", self.clock)
        for module in (channels_module, session_module):
            patch.setattr(module, "queue", Queues(self))
        for module in (client_module, worker_module):
            patch.setattr(
                module, "new_peer_id", lambda member: peer_id.member_mark(member) + self.random.randbytes(4)
            )
        patch.setattr(worker_module, "ComputeLoop", Compute)
        patch.setattr(pool_module, "DEFAULT_PAGE_TOKENS", 4)
        self.evict_after = self.random.choice([0.2, 10.0])
        chunk, self.max_queued_bytes = self.random.choice([(8, 10**9), (32, 10_000), (4096, 10**9)])
        patch.setattr(chunks, "CHUNK_BYTES", chunk)
        patch.setattr(history_module, "BLOCK_BYTES", 32)
        patch.setattr(broker_module, "PROBE_INTERVAL", 0.5)
        seal = channel_module.Box.seal

        def checked(box: Any, counter: int, data: bytes, plaintext: bytes) -> bytes:
            # No nonce seals twice; a channel's set-up has one message for each of its keys.
            assert (box._key, counter) not in self.sealed
            self.sealed.add((box._key, counter))
            return seal(box, counter, data, plaintext)

        patch.setattr(channel_module.Box, "seal", checked)

    # --- time ----------------------------------------------------------------------------------------------

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + seconds, next(self._order), act))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Lets events happen until a time, or until something is so."""
        while not done() and self._events and self._events[0][0] <= until:
            self.clock.now, _, act = heapq.heappop(self._events)
            assert self.clock.now < self.began + LIFETIME, "it goes on and on"
            act()
        if not done():
            self.clock.now = max(self.clock.now, until)

    # --- the network ---------------------------------------------------------------------------------------

    def new_route(self) -> bytes:
        return next(self._routes).to_bytes(5, "big")

    def to_broker(self, link: Link, frames: list[bytes]) -> None:
        route, broker = link.route, self.broker
        self.travel(link, lambda: broker.take(route, frames))

    def travel(self, link: Link, arrive: Callable[[], None]) -> None:
        """A message between a peer and the broker: late, twice, or not at all."""
        if self.clock.now < link.cut_until or self.random.random() < self.loss:
            return
        for _ in range(1 + (self.random.random() < self.repeats)):
            arrival = self.clock.now + self.random.expovariate(1 / self.lag)
            if self.random.random() < self.disorder:
                arrival += 10 * self.lag
            else:
                # Like a stream's: after those before it.
                arrival = link.arrival = max(link.arrival, arrival)
            self.after(arrival - self.clock.now, arrive)

    # --- who is there --------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        """It joins as events pass, since its start must not wait in the middle of what another one does."""
        link = Link(self, "worker-1")
        layers: Any = Layers(self.pages, self.asynchronous, self.random.random() < 0.7)
        limits = WorkerLimits(
            max_sessions=self.random.choice([2, 3, 100]),
            evict_after=self.evict_after,
            growth=4,
            max_queued_bytes=self.max_queued_bytes,
        )
        identity = self.fleet.identity("worker")
        worker = Worker(LanguageBody(layers, 0), SERVICE, "simulated", identity, self.fleet, link, limits)
        compute: Any = worker._compute
        compute.world, compute.link = self, link
        self.workers.append(worker)
        link.join(worker)

    def start_client(self) -> Client:
        identity = self.fleet.identity("device")
        link = Link(self, "device-1")
        client = Client(
            link,
            self.fleet,
            identity,
            SERVICE,
            "simulated",
            "float32",
            timeout=30.0,
            patience=60.0,
            step_timeout=self.random.choice([20.0, 60.0]),
        )
        client.start()
        return client

    def serving(self) -> list[Worker]:
        """Workers whose processes run and are connected."""
        links = [(worker, link_of(worker)) for worker in self.workers]
        return [w for w, link in links if link.up and not link.frozen and self.clock.now >= link.cut_until]

    # --- what may go wrong ---------------------------------------------------------------------------------

    def fault(self, kind: str, delay: float) -> None:
        """Something goes wrong after a delay, and comes right after some seconds."""
        self.after(delay, lambda: getattr(self, f"_{kind}")())

    def spare_step(self) -> None:
        """Before each step: two failures of one would be told to its caller."""
        self._may_fail = True
        for worker in self.workers:
            layers_of(worker).fails = False

    def _any(self) -> Worker | None:
        serving = self.serving()
        return self.random.choice(serving) if serving else None

    def _kill(self) -> None:
        if (worker := self._any()) is not None:
            link_of(worker).up = False
            self.after(self.random.uniform(0.1, 8.0), self.start_worker)

    def _freeze(self) -> None:
        if (worker := self._any()) is not None:
            link = link_of(worker)
            link.frozen = True
            self.after(self.random.uniform(0.1, 8.0), lambda: setattr(link, "frozen", False))

    def _hang(self) -> None:
        if (worker := self._any()) is not None:
            compute: Any = worker._compute
            compute.hangs = self.random.uniform(0.1, 8.0)

    def _fail(self) -> None:
        if (worker := self._any()) is not None and self._may_fail:
            layers_of(worker).fails, self._may_fail = True, False

    def _cut(self) -> None:
        if (worker := self._any()) is not None:
            link_of(worker).cut_until = self.clock.now + self.random.uniform(0.1, 8.0)

    def _cut_device(self) -> None:
        for link in self.links.values():
            if link.member == "device-1":
                link.cut_until = self.clock.now + self.random.uniform(0.1, 5.0)

    def _evict(self) -> None:
        if (worker := self._any()) is not None:
            worker._sessions.close_where(lambda _: True)
            worker._compute.wake()

    def _forget(self) -> None:
        """A worker loses its channels, as one does that has too many."""
        if (worker := self._any()) is not None:
            for id_ in list(worker._channels.open):
                worker._channels.close(id_)

    def _broker(self) -> None:
        self.broker.up = False
        self.after(self.random.uniform(0.1, 3.0), self._new_broker)

    def _new_broker(self) -> None:
        if not self.broker.up:
            self.broker = SimulatedBroker(self)
            for link in list(self.links.values()):
                if link.up:
                    link.reconnect()

    def _drain(self) -> None:
        if len(self.serving()) > 1 and (worker := self._any()) is not None:
            worker._draining = True
            self.after(5.0, lambda: setattr(worker, "_draining", False))


FAULTS = ("kill", "freeze", "hang", "fail", "cut", "cut_device", "evict", "forget", "broker", "drain")


def link_of(worker: Worker) -> Link:
    link = worker._transport
    assert isinstance(link, Link)
    return link


def layers_of(worker: Worker) -> Layers:
    body: Any = worker._body
    layers = body.runner
    assert isinstance(layers, Layers)
    return layers
