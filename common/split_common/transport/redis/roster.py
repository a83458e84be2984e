"""The fleet's roster in Redis. Only the operator's signature counts: neither who wrote it, nor what is said of it.

The operator publishes it under one key, which nobody else may write. Each worker keeps a copy under a key of its
own, so a server that has lost its data gets the roster back.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from split_common.errors import BrokerUnreachable, CertificateError, SplitError
from split_common.transport.redis.answers import failed
from split_common.transport.redis.eviction import eviction_policy, warning
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import Command, RedisConnections, RedisConnector
from split_common.transport.supervised import count_dropped
from split_common.trust.fleet import Fleet
from split_common.trust.keys import MAX_SIGNED, Roster, open_signed

log = logging.getLogger(__name__)

#: Bytes of an Ed25519 signature, with which a signed roster ends: by them two rosters are told apart.
_SIGNATURE = 64

#: Workers' copies that are looked at in one heartbeat, in turn.
COPIES = 4

#: Seconds during which a worker's copy is not looked at again after a false one was found there.
FALSE_COPY_PAUSE = 60.0


class RosterSync:
    """Keeps a peer's roster as new as the newest in the server.

    Args:
        connections: to the server.
        keys, fleet: names of the fleet's keys, and the peer's own roster.
        worker: the name of the worker that keeps a copy; empty for a device, which keeps none.
        counters: where rosters that are refused are counted, by type of error.
    """

    def __init__(
        self, connections: RedisConnections, keys: Keys, fleet: Fleet, worker: str, counters: Counter[str]
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._fleet = fleet
        self._own_copy = keys.roster_copy(worker) if worker else ""
        self._counters = counters
        self._version = fleet.roster().version
        self._turn = 0
        # The keys whose ends the last `commands` ask for.
        self._asked: list[str] = []
        # By key: the end of a roster that was refused, and when a worker's copy may be looked at again.
        self._refused: dict[str, bytes] = {}
        self._not_before: dict[str, float] = {}

    def commands(self) -> list[Command]:
        """The commands of a heartbeat; `compare` takes their answers."""
        self._fleet.refresh()
        members = self._fleet.roster().members
        copies = [
            self._keys.roster_copy(member.name)
            for member in members
            if member.role == "worker" and not member.revoked
        ]
        copies = [copies[(self._turn + i) % len(copies)] for i in range(min(COPIES, len(copies)))]
        self._turn += COPIES
        now = time.monotonic()
        others = [key for key in copies if key != self._own_copy and self._not_before.get(key, now) <= now]
        self._asked = [self._keys.roster, *filter(None, [self._own_copy]), *others]
        return [(key, ("GETRANGE", key, -_SIGNATURE, -1)) for key in self._asked]

    def compare(self, answers: list[object]) -> bool:
        """Fetches newer rosters, and stores the worker's copy. True if the peer's is newer than at the last call.

        A roster in the server that is not one of this fleet, or an older one, is counted and ignored.

        Raises:
            BrokerUnreachable: the server does not answer.
        """
        own_copy: object = None
        for key, end in zip(self._asked, answers, strict=True):
            if key == self._own_copy:
                own_copy = end
            if isinstance(end, bytes) and end not in (b"", self._end(), self._refused.get(key)):
                self._fetch(key, end)
        if self._own_copy and own_copy != self._end():
            self._connections.run_allowed([(self._own_copy, ("SET", self._own_copy, self._fleet.roster_bytes()))])
        known, self._version = self._version, self._fleet.roster().version
        return self._version > known

    def _end(self) -> bytes:
        return self._fleet.roster_bytes()[-_SIGNATURE:]

    def _fetch(self, key: str, end: bytes) -> None:
        """Adopts the roster under a key if it is a newer one of this fleet."""
        (data,) = self._connections.run_allowed([(key, ("GETRANGE", key, 0, MAX_SIGNED["roster"]))])
        try:
            self._fleet.accept_roster(data if isinstance(data, bytes) else b"")
        except SplitError as error:
            count_dropped(self._counters, error)
            self._refused[key] = end
            if key != self._keys.roster:
                self._not_before[key] = time.monotonic() + FALSE_COPY_PAUSE


def publish(address: str, fleet: Fleet) -> int:
    """Stores the roster, or adopts the server's if that is newer. Returns the version that is then in both places.

    Whatever else is stored there is replaced: a roster that is older, damaged or not signed.

    Raises:
        ConfigError: the address is malformed.
        BrokerUnreachable: the server does not answer, or does not store it.
        CertificateError: the server has another roster of the same version, signed by this fleet's operator.
    """
    server = RedisConnector(address)
    connections = RedisConnections(server)
    key = Keys(fleet.operator_key).roster
    try:
        (stored,) = connections.run([(key, ("GETRANGE", key, 0, MAX_SIGNED["roster"]))])
        failed(stored, server.shown)
        if _version(stored, fleet) >= fleet.roster().version:
            fleet.accept_roster(stored)
        else:
            (answer,) = connections.run([(key, ("SET", key, fleet.roster_bytes()))])
            if problem := failed(answer, server.shown):
                raise BrokerUnreachable(f"{server.shown} does not store the roster: {problem}")
        if policy := eviction_policy(connections, key):
            log.warning("%s", warning(server.shown, policy))
    finally:
        connections.close()
        server.close()
    return fleet.roster().version


def _version(data: object, fleet: Fleet) -> int:
    """The version of a stored roster; 0 if it is not one of this fleet."""
    try:
        return open_signed("roster", Roster, data, fleet.operator_key).version if isinstance(data, bytes) else 0
    except CertificateError:
        return 0
