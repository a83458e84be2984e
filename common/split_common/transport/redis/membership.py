"""The other peers: the list of workers, which peers are alive, and whose lanes are full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from split_common.errors import Malformed, SplitError
from split_common.protocol import headers
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import Command, RedisConnections, failed
from split_common.transport.supervised import count_dropped
from split_common.trust.keys import Role

#: Seconds after which the list of workers, and the opens of a service, expire unless a worker renews them.
OPENS_LEASE = 60.0


class Registry:
    """The fleet's peers, as the server knows them. For the housekeeping thread; others may read `full`.

    Args:
        connections: to the server.
        keys: names of the fleet's keys.
        counters: of the link.
    """

    def __init__(self, connections: RedisConnections, keys: Keys, counters: Counter[str]) -> None:
        self._connections = connections
        self._keys = keys
        self._counters = counters
        #: Watched peers whose lanes are full.
        self.full: frozenset[bytes] = frozenset()

    # --- this worker's own entry -----------------------------------------------------------------------------

    def registration(self, announcement: headers.Announce) -> list[Command]:
        """The commands that put a worker on the list, where devices find it."""
        workers = self._keys.workers
        public = headers.encode_header(msgspec.structs.replace(announcement, watching=[]))
        return [
            (workers, ("HSET", workers, announcement.sender.hex(), public)),
            (workers, ("PEXPIRE", workers, int(OPENS_LEASE * 1000))),
        ]

    def removal(self, *names: str | bytes) -> list[Command]:
        """The commands that take workers off the list, by their ids in hex."""
        return [(self._keys.workers, ("HDEL", self._keys.workers, *names))] if names else []

    # --- others ----------------------------------------------------------------------------------------------

    def alive(self, role: Role, peers: Iterable[bytes]) -> dict[bytes, int]:
        """The peers that are alive, and the bytes in the lane of each."""
        peers = list(peers)
        lanes = [self._keys.lane(role, peer) for peer in peers]
        answers = self._connections.run_allowed([(lane, ("MEMORY", "USAGE", lane)) for lane in lanes])
        return {peer: size for peer, size in zip(peers, answers, strict=True) if isinstance(size, int)}

    def watch(self, role: Role, peers: Iterable[bytes]) -> list[bytes]:
        """Checks the lanes of watched peers, and notes which are `full`. Returns the peers that are gone."""
        peers = list(peers)
        sizes = self.alive(role, peers)
        self.full = frozenset(peer for peer, size in sizes.items() if size > QUEUE_BYTES)
        return [peer for peer in peers if peer not in sizes]

    def workers(self) -> list[headers.Announce]:
        """The announcements of all workers that are alive.

        Raises:
            Malformed: the list is not a hash.
        """
        announced, _ = self._listed()
        alive = self.alive("worker", announced)
        return [worker for peer, worker in announced.items() if peer in alive]

    def clean_up(self) -> None:
        """Takes dead workers off the list, and entries that are not announcements."""
        announced, wrong = self._listed()
        alive = self.alive("worker", announced)
        if gone := self.removal(*(peer.hex() for peer in announced if peer not in alive), *wrong):
            self._connections.run_allowed(gone)

    def _listed(self) -> tuple[dict[bytes, headers.Announce], list[bytes]]:
        """All announcements on the list, even of dead workers, and the names of all other entries."""
        (flat,) = self._connections.run_allowed([(self._keys.workers, ("HGETALL", self._keys.workers))])
        if failed(flat):
            raise Malformed("the list of workers is not a hash")
        announced, wrong = {}, []
        for name, value in zip(flat[::2], flat[1::2], strict=True):
            try:
                header = headers.decode_header(value)
                if not isinstance(header, headers.Announce) or header.sender.hex().encode() != name:
                    raise Malformed("an announcement of another peer")
                announced[header.sender] = header
            except SplitError as error:
                wrong.append(name)
                count_dropped(self._counters, error)
        return announced, wrong
