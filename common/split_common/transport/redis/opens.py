"""A device's opens over Redis. The device chooses the worker itself, and adds the open to that worker's lane.

So no worker can take what was not meant for it. An open that a worker does not answer is repeated by the device,
and then goes to another one.
"""

from __future__ import annotations

import random
import time

import msgspec

from split_common.protocol import headers
from split_common.transport.base import FULL_RETRY, OPEN_PATIENCE
from split_common.transport.peer_id import member_of
from split_common.transport.placement import Assign, Candidate, PendingOpen, Refuse, Wait, decide, full
from split_common.transport.redis.answers import failed
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.key_names import Keys, entry
from split_common.transport.redis.membership import Registry
from split_common.transport.redis.server import RedisConnections

#: Seconds during which workers of a member that left an open unanswered are asked last.
SILENT_PAUSE = 30.0


class DeviceOpens:
    """A device's open, until it is on a worker's lane. For the housekeeping thread; any may call `answered`.

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
        # The channel of the newest open, and the workers that were given it.
        self._channel = -1
        self._asked: list[bytes] = []
        # Until when the workers of a member, by its mark, are asked last, because one did not answer.
        self._silent: dict[bytes, float] = {}

    @property
    def waiting(self) -> bool:
        return self._pending is not None

    def take(self, header: headers.Open, body: bytes) -> None:
        """Takes a new open. One that is repeated while it waits keeps its deadline."""
        if self._pending is None or self._pending.header.channel != header.channel:
            frames = headers.encode_header(header), body
            self._pending = PendingOpen(header, frames, time.monotonic() + OPEN_PATIENCE)
        if self._channel != header.channel:
            self._channel, self._asked = header.channel, []
        elif self._asked:
            self._silent[member_of(self._asked[-1])] = time.monotonic() + SILENT_PAUSE

    def answered(self, channel: int, worker: bytes) -> None:
        """Forgets the open of a channel: a worker has answered it."""
        self._silent.pop(member_of(worker), None)
        pending = self._pending
        if pending is not None and pending.header.channel == channel:
            self._done(pending)

    def place(self, early: bool) -> None:
        """Adds the open to a worker's lane, or tells the device that no worker can take it.

        Args:
            early: whether workers that are alive may be missing.
        """
        pending = self._pending
        if pending is None:
            return
        workers = [
            Candidate(worker.sender, worker.service, worker.model, worker.room)
            for worker in self._registry.workers()
            if worker.service is not None
        ]
        # Devices that look for a worker at the same time must not all take the same one.
        random.shuffle(workers)
        match self._decide(pending, workers, early):
            case Assign(worker):
                self._add(pending, worker)
            case Refuse() as refusal:
                if refusal.reason == "no-worker" and self._registry.older_workers():
                    refusal = refusal._replace(detail="only workers of an older version, which have to be updated")
                self._done(pending)
                self._caller.refuse(pending.header, refusal)

    def _decide(self, pending: PendingOpen[bytes], workers: list[Candidate], early: bool) -> Assign | Refuse | Wait:
        """As the policy decides.

        Workers of members that left an open unanswered are asked last, and of those the same process comes last: a
        member can run any number of processes that answer nothing.
        """
        now = time.monotonic()
        self._silent = {member: until for member, until in self._silent.items() if until > now}
        shunned = [worker.id for worker in workers if member_of(worker.id) in self._silent]
        for last in ([*shunned, *self._asked], self._asked):
            header = msgspec.structs.replace(pending.header, avoid=[*pending.header.avoid, *last])
            outcome = decide(PendingOpen(header, pending.frames, pending.deadline), workers, early, now)
            if isinstance(outcome, Assign):
                return outcome
        self._asked.clear()
        return decide(pending, workers, early, now)

    def _add(self, pending: PendingOpen[bytes], worker: bytes) -> None:
        """Adds an open to a worker's lane. It stays pending if the worker has gone meanwhile."""
        lane = self._keys.lane("worker", worker)
        (id_,) = self._connections.run_allowed([(lane, ("XADD", lane, "NOMKSTREAM", "*", *entry(*pending.frames)))])
        if isinstance(id_, bytes):
            self._asked.append(worker)
            self._done(pending)
        elif problem := failed(id_):
            self._done(pending)
            self._caller.refuse(pending.header, full(problem, 2 * FULL_RETRY))

    def _done(self, pending: PendingOpen[bytes]) -> None:
        if self._pending is pending:
            self._pending = None
