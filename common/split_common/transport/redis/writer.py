"""Writes messages to other peers' lanes, in the order in which they were handed over.

A thread that sends writes to the connection itself if that cannot block: the connection stands, nothing else waits
to be sent, and what the server has not answered yet fits into a socket's buffer. The writer's thread sends the
rest. It alone reads answers, because they may lead to calls of the peer's handler.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import OutOfMemoryError, ResponseError

from split_common.errors import BrokerUnreachable
from split_common.protocol import headers
from split_common.transport.base import FULL_RETRY, OUTBOX_BYTES
from split_common.transport.placement import full
from split_common.transport.redis.answers import Refused, Unreachable, failed
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.membership import Registry
from split_common.transport.redis.server import RECONNECT, RECONNECT_MAX, Command, RedisConnections
from split_common.transport.supervised import count_dropped

#: Most bytes of messages in one round trip of the writer's thread, unless a single one is larger.
BATCH_BYTES = 4 * 1024 * 1024

#: Bytes of unanswered messages up to which senders write themselves: a socket's buffer always holds as much.
DIRECT_BYTES = 32 * 1024

#: Seconds after which the answers to senders' own writes are read.
ANSWER_DELAY = 0.01

#: Seconds that closing may take to write what is queued.
LINGER = 0.5

log = logging.getLogger(__name__)


@dataclass
class Outgoing:
    """The command that adds a message to a lane, and the message's header and size in bytes."""

    command: Command
    header: headers.Relay
    size: int


class Writer:
    """Writes what is `put`, until `close`. `run` is its thread.

    Args:
        connections: to the server; the writer's own.
        registry: knows how full the peers' lanes are.
        caller: tells the peer which of its messages were refused.
        undelivered: gets the header of each message whose receiver has no lane.
        counters: of the link.
    """

    def __init__(
        self,
        connections: RedisConnections,
        registry: Registry,
        caller: Caller,
        undelivered: Callable[[headers.Relay], None],
        counters: Counter[str],
    ) -> None:
        self._connections = connections
        self._registry = registry
        self._caller = caller
        self._undelivered = undelivered
        self._counters = counters
        # Guards the connections and all below but `_handed`. `put` never waits for it.
        self._turn = threading.Lock()
        self._handed: deque[Outgoing] = deque()
        self._unsent: deque[Outgoing] = deque()
        self._unsent_bytes = 0
        # Commands that senders wrote themselves and whose answers have not been read.
        self._posted: list[Outgoing] = []
        self._posted_bytes = 0
        # Wakes the thread. `SimpleQueue.put` is reentrant: the garbage collector may call `put` within itself.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closing = threading.Event()

    def put(self, outgoing: Outgoing) -> None:
        """Takes a command and never blocks. Any thread may call it, and so may the garbage collector."""
        if self._turn.acquire(blocking=False):
            try:
                idle = not self._posted
                if self._post(outgoing):
                    if idle:
                        self._wakes.put(None)
                    return
            finally:
                self._turn.release()
        self._handed.append(outgoing)
        self._wakes.put(None)

    def close(self) -> None:
        self._closing.set()
        self._wakes.put(None)

    def _post(self, outgoing: Outgoing) -> bool:
        """Sends a command at once, unless that could block or something else waits to be sent. Whether it did."""
        size = self._posted_bytes + outgoing.size
        if self._handed or self._unsent or size > DIRECT_BYTES or self._full(outgoing):
            return False
        if not self._connections.post(outgoing.command):
            return False
        self._posted.append(outgoing)
        self._posted_bytes = size
        return True

    def _full(self, outgoing: Outgoing) -> bool:
        return not self._registry.takes(outgoing.header.to, outgoing.size)

    # --- the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        pause, give_up = RECONNECT, float("inf")
        while True:
            self._wait()
            try:
                with self._turn:
                    answered = self._exchange()
            except BrokerUnreachable as error:
                log.debug("not written: %s", error)
                self._closing.wait(pause)
                pause = min(2 * pause, RECONNECT_MAX)
            else:
                pause = RECONNECT
                for outgoing, answer in answered:
                    self._written(outgoing, answer)
            if self._closing.is_set():
                give_up = min(give_up, time.monotonic() + LINGER)
                if not (self._handed or self._unsent or self._posted) or time.monotonic() > give_up:
                    return

    def _wait(self) -> None:
        """Waits until there is something to do."""
        if self._unsent or self._closing.is_set():
            return
        self._wakes.get()
        with contextlib.suppress(queue.Empty):
            while True:
                # If senders wrote themselves, only answers are due, and they can wait.
                self._wakes.get(timeout=0.0 if self._handed or self._closing.is_set() else ANSWER_DELAY)

    def _exchange(self) -> list[tuple[Outgoing, object]]:
        """Sends a batch, and reads the answers to it and to senders' own writes.

        Raises:
            BrokerUnreachable: the server does not answer. The commands will be sent again.
        """
        posted, self._posted, self._posted_bytes = self._posted, [], 0
        self._collect()
        batch = posted + self._next_batch()
        try:
            answers = self._connections.run([outgoing.command for outgoing in batch], posted=len(posted))
        except BrokerUnreachable:
            # Some of it may have arrived. It is sent again: sessions recognize repeated messages by their numbers.
            self._unsent.extendleft(reversed(batch))
            self._unsent_bytes += sum(outgoing.size for outgoing in batch)
            raise
        return list(zip(batch, answers, strict=True))

    def _collect(self) -> None:
        """Takes over what was handed over. Drops what exceeds `OUTBOX_BYTES`."""
        while self._handed:
            outgoing = self._handed.popleft()
            if self._unsent_bytes + outgoing.size > OUTBOX_BYTES:
                self._counters["outbox_full"] += 1
            else:
                self._unsent.append(outgoing)
                self._unsent_bytes += outgoing.size

    def _next_batch(self) -> list[Outgoing]:
        """Takes the commands to be sent next. Refuses messages for peers whose lanes are full."""
        batch: list[Outgoing] = []
        size = 0
        while self._unsent and size < BATCH_BYTES:
            outgoing = self._unsent.popleft()
            self._unsent_bytes -= outgoing.size
            if self._full(outgoing):
                self._caller.refuse(outgoing.header, full("the queue of the peer is full"))
            else:
                batch.append(outgoing)
                size += outgoing.size
        return batch

    def _written(self, outgoing: Outgoing, answer: object) -> None:
        header = outgoing.header
        if isinstance(answer, bytes):
            self._counters["messages_sent"] += 1
            self._counters["bytes_sent"] += outgoing.size
        elif isinstance(answer, ResponseError):
            try:
                problem = failed(answer)
                if not isinstance(answer, OutOfMemoryError):
                    count_dropped(self._counters, Refused(problem))
            except Unreachable as error:
                # The housekeeper says it.
                log.debug("not written: %s", error)
            except Refused as error:
                count_dropped(self._counters, error)
            self._caller.refuse(header, full("the server takes no more", 2 * FULL_RETRY))
        else:
            self._undelivered(header)
