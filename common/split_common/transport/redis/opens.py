"""The stream of a service's opens: devices that look for a worker add to it, and the service's workers read it.

The workers are a consumer group, so each open goes to one of them. A worker reads one at a time, only while it has
room, and deletes an open from the stream once its answer is queued.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from split_common.protocol import headers
from split_common.transport.base import HEARTBEAT, OPEN_PATIENCE
from split_common.transport.placement import Assign, Candidate, PendingOpen, Refuse, decide
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.key_names import GROUP, Keys, entry, next_id
from split_common.transport.redis.membership import OPENS_LEASE, Registry
from split_common.transport.redis.reader import READ_WAIT
from split_common.transport.redis.server import RECONNECT, Command, RedisConnections, Refused, Unreachable, failed
from split_common.transport.redis.writer import Outgoing, Writer

#: Seconds between two checks whether there is room for another session.
ROOM_INTERVAL = 0.2

#: Seconds after which an open in the stream is dropped: its device was told to try again before.
STALE = 2 * OPEN_PATIENCE

#: Most opens of dead workers that are taken over in one heartbeat.
CLAIM_COUNT = 16

log = logging.getLogger(__name__)


class DeviceOpens:
    """A device's open, until a worker answers it. For the housekeeping thread; any thread may call `answered`.

    Args:
        connections: to the server.
        keys: names of the fleet's keys.
        registry: knows the workers that are alive.
        caller: tells the device that its open is refused.
    """

    def __init__(self, connections: RedisConnections, keys: Keys, registry: Registry, caller: Caller) -> None:
        self._connections = connections
        self._keys = keys
        self._registry = registry
        self._caller = caller
        self._pending: PendingOpen[bytes] | None = None

    @property
    def waiting(self) -> bool:
        return self._pending is not None

    def take(self, header: headers.Open, body: bytes) -> None:
        """Takes a new open. One that is repeated keeps its deadline."""
        if self._pending is None or self._pending.header.channel != header.channel:
            frames = headers.encode_header(header), body
            self._pending = PendingOpen(header, frames, time.monotonic() + OPEN_PATIENCE)

    def answered(self, channel: int) -> None:
        """Forgets the open of a channel: a worker has answered it."""
        pending = self._pending
        if pending is not None and pending.header.channel == channel:
            self._pending = None

    def place(self, early: bool) -> None:
        """Adds the open to its service's stream, or tells the device that no worker can take it.

        Args:
            early: whether workers that are alive may be missing.
        """
        pending = self._pending
        if pending is None:
            return
        if pending.placed and self._is_taken(pending):
            # A worker has answered it, or its answer is on the way.
            self._done(pending)
            return
        workers = [
            Candidate(worker.sender, worker.service, worker.model, worker.room)
            for worker in self._registry.workers()
            if worker.service is not None
        ]
        match decide(pending, workers, early, time.monotonic()):
            case Assign(worker):
                self._add(pending, worker)
            case Refuse() as refusal:
                self._done(pending)
                self._caller.refuse(pending.header, refusal)

    def _add(self, pending: PendingOpen[bytes], worker: bytes) -> None:
        """Adds an open to the stream, where any worker with room takes it.

        If the device avoids some workers, the open goes to the lane of the chosen one instead, because the stream
        might hand it to one that is avoided.
        """
        avoids = bool(pending.header.avoid)
        key = self._keys.lane("worker", worker) if avoids else self._keys.opens(pending.header.service)
        (id_,) = self._connections.run_allowed([(key, ("XADD", key, "NOMKSTREAM", "*", *entry(*pending.frames)))])
        if not isinstance(id_, bytes):
            return
        if avoids:
            self._done(pending)
        else:
            pending.placed = True

    def _is_taken(self, pending: PendingOpen[bytes]) -> bool:
        """Whether an open that was added to the stream has left it: workers delete what they answered."""
        opens = self._keys.opens(pending.header.service)
        (length,) = self._connections.run_allowed([(opens, ("XLEN", opens))])
        return not (isinstance(length, int) and length > 0)

    def _done(self, pending: PendingOpen[bytes]) -> None:
        if self._pending is pending:
            self._pending = None


class WorkerOpens:
    """A worker's side of the stream. `run` reads it on its own thread; `tend` is for the housekeeping thread.

    Args:
        connections, housekeeping_connections: to the server, one for each of the two threads.
        opens: the key of the stream.
        member: the worker's name in the consumer group.
        take: is handed the fields of each open, and queues its answer.
        writer: of the link.
        closing: ends `run`.
    """

    def __init__(
        self,
        connections: RedisConnections,
        housekeeping_connections: RedisConnections,
        opens: str,
        member: str,
        take: Callable[[Any], None],
        writer: Writer,
        closing: threading.Event,
    ) -> None:
        self._connections = connections
        self._housekeeping_connections = housekeeping_connections
        self._opens = opens
        self._member = member
        self._take = take
        self._writer = writer
        self._closing = closing
        #: Sessions that the worker has room for, less the opens that it took since it announced that.
        self.room = 0
        # The server's time at the last heartbeat, in milliseconds.
        self._server_time = 0

    def renewal(self) -> list[Command]:
        """The commands that keep the stream for as long as there are heartbeats."""
        return [(self._opens, ("PEXPIRE", self._opens, int(OPENS_LEASE * 1000)))]

    def tend(self) -> None:
        """Takes over opens that dead workers read and did not answer; drops opens that no device waits for."""
        opens = self._opens
        oldest = max(0, self._server_time - int(STALE * 1000))
        idle = int(HEARTBEAT * 1000)
        moment, _, claimed = self._housekeeping_connections.run_allowed(
            [
                (opens, ("TIME",)),
                (opens, ("XTRIM", opens, "MINID", oldest)),
                (opens, ("XAUTOCLAIM", opens, GROUP, self._member, idle, 0, "COUNT", CLAIM_COUNT)),
            ]
        )
        if failed(claimed):
            self._make_group(self._housekeeping_connections)
        else:
            for id_, fields in claimed[1]:
                self._take_open(id_, fields)
        self._server_time = int(moment[0]) * 1000

    def run(self) -> None:
        words = (
            *("XREADGROUP", "GROUP", GROUP, self._member, "COUNT", 1),
            *("BLOCK", int(1000 * READ_WAIT), "STREAMS", self._opens, ">"),
        )
        while not self._closing.is_set():
            if self.room <= 0:
                self._closing.wait(ROOM_INTERVAL)
                continue
            try:
                self._read((self._opens, words))
            except Unreachable as error:
                log.debug("not read: %s", error)
                self._closing.wait(RECONNECT)

    def _read(self, command: Command) -> None:
        """Takes the next open, if one comes. Raises Unreachable, Refused."""
        (answer,) = self._connections.run([command])
        if isinstance(answer, ResponseError):
            if "NOGROUP" not in str(answer):
                raise Refused(str(answer))
            self._make_group(self._connections)
            self._closing.wait(RECONNECT)
            return
        for id_, fields in answer[0][1] if answer else []:
            self._take_open(id_, fields)
            if next_id(id_) is None:
                # Nothing can be added after it.
                self._make_group(self._connections, replace=True)

    def _take_open(self, id_: bytes, fields: Any) -> None:
        """Takes an open. Its answer is queued before it is deleted from the stream."""
        self.room -= 1
        self._take(fields)
        self._writer.put(Outgoing((self._opens, ("XACK", self._opens, GROUP, id_))))
        self._writer.put(Outgoing((self._opens, ("XDEL", self._opens, id_))))

    def _make_group(self, connections: RedisConnections, replace: bool = False) -> None:
        """Makes the stream and its consumer group if they are missing; `replace` deletes the old ones first."""
        commands: list[Command] = [(self._opens, ("DEL", self._opens))] if replace else []
        commands.append((self._opens, ("XGROUP", "CREATE", self._opens, GROUP, "0", "MKSTREAM")))
        # A new stream would stay for ever if the worker ended before its next heartbeat.
        commands += self.renewal()
        for answer in connections.run(commands):
            failed(answer)
