"""The fleet's roster in Redis. Readers verify the operator's signature, so the writer need not be trusted."""

from __future__ import annotations

from collections import Counter

from split_common.errors import BrokerUnreachable, Malformed, SplitError
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import Command, RedisConnections, RedisConnector, failed
from split_common.transport.supervised import count_dropped
from split_common.trust.fleet import Fleet
from split_common.trust.keys import MAX_SIGNED

#: Digits that a roster's version may have.
_DIGITS = 18


class RosterSync:
    """Keeps a peer's roster and the server's the same: the newer one replaces the other.

    Args:
        connections: to the server.
        keys, fleet: names of the fleet's keys, and the peer's own roster.
        stores: whether the peer may write its roster to the server, as workers may.
        counters: where rosters that are refused are counted, by type of error.
    """

    def __init__(
        self, connections: RedisConnections, keys: Keys, fleet: Fleet, stores: bool, counters: Counter[str]
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._fleet = fleet
        self._stores = stores
        self._counters = counters
        self._version = fleet.roster().version
        #: The command whose answer `compare` takes: the version of the server's roster.
        self.version_command = _version_command(keys)

    def compare(self, answer: object) -> bool:
        """Fetches or stores the roster if necessary. True if the peer has a newer one than at the last call.

        A roster in the server that is not one of this fleet is counted, and ignored.

        Raises:
            BrokerUnreachable: the server does not answer, or does not store it.
        """
        self._fleet.refresh()
        try:
            self._exchange(_version_of(answer), self._fleet.roster().version)
        except BrokerUnreachable:
            raise
        except SplitError as error:
            count_dropped(self._counters, error)
        known, self._version = self._version, self._fleet.roster().version
        return self._version > known

    def _exchange(self, there: int, here: int) -> None:
        if there > here:
            _fetch(self._connections, self._keys, self._fleet)
        elif there < here and self._stores:
            _put(self._connections, self._keys, self._fleet)


def publish(address: str, fleet: Fleet) -> int:
    """Stores the roster, or adopts the server's if that is newer. Returns the version that is then in both places.

    Raises:
        ConfigError: the address is malformed.
        BrokerUnreachable: the server does not answer, or does not store it.
        CertificateError: the server's newer roster is not signed by this fleet's operator.
    """
    server = RedisConnector(address)
    connections = RedisConnections(server)
    keys = Keys(fleet.operator_key)
    try:
        (answer,) = connections.run([_version_command(keys)])
        if problem := failed(answer):
            raise BrokerUnreachable(f"{server.shown}: {problem}")
        if _version_of(answer) > fleet.roster().version:
            _fetch(connections, keys, fleet)
        else:
            _put(connections, keys, fleet)
    finally:
        connections.close()
        server.close()
    return fleet.roster().version


def _version_command(keys: Keys) -> Command:
    return keys.roster_version, ("GETRANGE", keys.roster_version, 0, _DIGITS - 1)


def _version_of(answer: object) -> int:
    """The version of the server's roster, which is not verified; 0 if there is none.

    Raises:
        Malformed: it is not a number.
    """
    if not isinstance(answer, bytes) or not (answer.isdigit() or not answer):
        raise Malformed("the roster's version is not a number")
    return int(answer or b"0")


def _fetch(connections: RedisConnections, keys: Keys, fleet: Fleet) -> None:
    """Adopts the server's roster.

    Raises:
        CertificateError: it is not this fleet's, or older than the peer's.
        BrokerUnreachable: the server does not answer.
    """
    (data,) = connections.run([(keys.roster, ("GETRANGE", keys.roster, 0, MAX_SIGNED["roster"]))])
    fleet.accept_roster(data)


def _put(connections: RedisConnections, keys: Keys, fleet: Fleet) -> None:
    """Stores the peer's roster.

    Raises:
        BrokerUnreachable: the server does not answer, or does not store it.
    """
    version, data = fleet.roster().version, fleet.roster_bytes()
    commands = (
        ("MULTI",),
        ("SET", keys.roster, data),
        ("SET", keys.roster_version, version),
        ("EXEC",),
    )
    for answer in connections.run([(keys.roster, words) for words in commands]):
        if problem := failed(answer):
            raise BrokerUnreachable(f"the roster was not stored: {problem}")
