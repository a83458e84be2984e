"""A device's opens over Redis. The device chooses the worker itself, and adds the open to that worker's lane.

So no worker can take what was not meant for it. An open that a worker does not answer is repeated by the device,
and then goes to another one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Container, Iterable

from split_common.protocol import headers
from split_common.transport.base import FULL_RETRY, OPEN_PATIENCE
from split_common.transport.placement import Assign, Candidate, PendingOpen, Refuse, Silences, Wait, decide, full
from split_common.transport.redis.answers import failed
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.key_names import Keys, entry
from split_common.transport.redis.membership import Registry
from split_common.transport.redis.server import RedisConnections
from split_common.transport.redis.trials import SharedTrials


class DeviceOpens:
    """A device's open, until it is on a worker's lane. For the housekeeping thread.

    Any thread may call `answered` and `used`.

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
        #: The channel of the newest open, until it is used.
        self.unproven = -1
        # When the newest open came first, and the workers that were given it, with their members' names.
        self._channel = -1
        self._since = 0.0
        self._asked: dict[bytes, str] = {}
        self._silences: Silences[str] = Silences()
        #: Workers that have answered no device yet.
        self.trials = SharedTrials(connections, keys)
        # The worker over whose channel the device sent its first request.
        self._proven: bytes | None = None

    @property
    def waiting(self) -> bool:
        return self._pending is not None

    def take(self, header: headers.Open, body: bytes) -> None:
        """Takes an open. One that is repeated was not answered, and keeps its deadline."""
        now = time.monotonic()
        self._end_silence()
        if self._channel != header.channel:
            self.unproven = self._channel = header.channel
            self._since, self._asked = now, {}
        elif self._pending is None and self._asked:
            *_, member = self._asked.values()
            self._silences.note(member, now)
        frames = headers.encode_header(header), body
        self._pending = PendingOpen(header, frames, self._since + OPEN_PATIENCE)

    def answered(self, channel: int) -> None:
        """Forgets the open of a channel: a worker has answered it."""
        pending = self._pending
        if pending is not None and pending.header.channel == channel:
            self._done(pending)

    def used(self, header: headers.Relay) -> None:
        """Takes note that the device sends a message over the channel `unproven`.

        Only a request shows that the worker has answered with more than junk.
        """
        if header.kind == headers.RelayKind.REQUEST:
            self.unproven, self._proven = -1, header.to

    def _end_silence(self) -> None:
        worker, self._proven = self._proven, None
        if worker in self._asked:
            self._silences.end(self._asked[worker])

    def place(self, early: bool) -> None:
        """Adds the open to a worker's lane, or tells the device that no worker can take it.

        Args:
            early: whether workers that are alive may be missing.
        """
        pending = self._pending
        if pending is None:
            return
        workers = self._registry.workers()
        match self._decide(pending, workers, early):
            case Assign(id_):
                self._add(pending, next(worker for worker in workers if worker.id == id_))
            case Refuse() as refusal:
                if refusal.reason == "no-worker":
                    refusal = self._explained(refusal)
                self._done(pending)
                self._caller.refuse(pending.header, refusal)

    def _decide(self, pending: PendingOpen[bytes], workers: list[Candidate], early: bool) -> Assign | Refuse | Wait:
        now = time.monotonic()
        drawn = two_of_each(workers, {*pending.header.avoid, *self._asked})
        silent = self._silences.now(now)
        members = {worker.id: worker.member for worker in drawn}
        tried = self.trials.tried(set(members.values()))
        while True:
            decision = decide(pending, drawn, early, now, silent, self._asked, tried=tried)
            if not isinstance(decision, Assign) or members[decision.worker] in tried:
                return decision
            if self.trials.begin(members[decision.worker]):
                return decision
            tried.add(members[decision.worker])

    def _explained(self, refusal: Refuse) -> Refuse:
        """The same, with the reasons why workers that are there were left out."""
        if self._registry.older_workers():
            refusal = refusal._replace(detail=f"{refusal.detail}; workers of an older version have to be updated")
        return refusal.without(self._registry.turned_away)

    def _add(self, pending: PendingOpen[bytes], worker: Candidate) -> None:
        """Adds an open to a worker's lane. It stays pending if the worker has gone meanwhile."""
        lane = self._keys.lane("worker", worker.id)
        (id_,) = self._connections.run_allowed([(lane, ("XADD", lane, "NOMKSTREAM", "*", *entry(*pending.frames)))])
        if isinstance(id_, bytes):
            self._asked.pop(worker.id, None)
            self._asked[worker.id] = worker.member
            self._done(pending)
        elif problem := failed(id_):
            self._done(pending)
            self._caller.refuse(pending.header, full(problem, 2 * FULL_RETRY))

    def _done(self, pending: PendingOpen[bytes]) -> None:
        if self._pending is pending:
            self._pending = None


def two_of_each(workers: Iterable[Candidate], avoid: Container[bytes]) -> list[Candidate]:
    """Of each member and service, at most two of the workers with room, drawn at random; and all others.

    Every device decides for itself, by rooms that may be a heartbeat old: if each took the roomiest of a member's
    processes, all would take the same one.
    """
    able: dict[tuple[str, headers.Service], list[Candidate]] = {}
    kept = []
    for worker in workers:
        if worker.room > 0 and worker.id not in avoid:
            able.setdefault((worker.member, worker.service), []).append(worker)
        else:
            kept.append(worker)
    for group in able.values():
        # Of equal ones the policy takes the first.
        kept += random.sample(group, min(2, len(group)))
    random.shuffle(kept)
    return kept
