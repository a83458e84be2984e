"""The other peers: which workers there are, which peers are alive, and whose lanes are full.

The processes of one member share a list of their announcements, which only that member may write. So no worker can
remove or change what others announce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from split_common.errors import Malformed, SplitError
from split_common.protocol import headers
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.peer_id import member_mark, member_of
from split_common.transport.redis.answers import failed
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import RedisConnections
from split_common.transport.supervised import count_dropped
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Role

#: Seconds after which a member's list expires unless one of its processes renews it.
LIST_LEASE = 60.0

#: Most bytes of a member's list that are read. A longer one counts as damaged, and its owner begins a new one.
MAX_LIST = 128 * 1024

#: Heartbeats of a worker between two clean-ups of its member's list.
CLEAN_UP = 10


class Registry:
    """The fleet's peers, as the server knows them. For the housekeeping thread; others may read `full`.

    Args:
        connections: to the server.
        keys, fleet: names of the fleet's keys, and the fleet, whose roster says which workers there may be.
        counters: of the link.
    """

    def __init__(self, connections: RedisConnections, keys: Keys, fleet: Fleet, counters: Counter[str]) -> None:
        self._connections = connections
        self._keys = keys
        self._fleet = fleet
        self._counters = counters
        self._beats = 0
        #: Watched peers whose lanes are full.
        self.full: frozenset[bytes] = frozenset()

    # --- this worker's own entry -----------------------------------------------------------------------------

    def enlist(self, announcement: headers.Announce, tidy: bool = True) -> None:
        """Puts a worker on its member's list, where devices find it, or takes it off it if it leaves.

        If two processes of the member do this at the same time, what one of them wrote is lost until its next
        heartbeat.

        Args:
            announcement: the worker's.
            tidy: whether to take dead processes off the list now and then.
        """
        listed = self._read([announcement.member])
        listed.pop(announcement.sender, None)
        self._beats += 1
        if listed and tidy and self._beats % CLEAN_UP == 0:
            alive = self.alive("worker", listed)
            listed = {peer: other for peer, other in listed.items() if peer in alive}
        entries = [headers.encode_header(other) for other in listed.values()]
        if not announcement.leaving:
            entries.append(headers.encode_header(msgspec.structs.replace(announcement, watching=[])))
        while len(data := msgspec.msgpack.encode(entries)) > MAX_LIST:
            # The first one was renewed longest ago.
            entries.pop(0)
        key, lease = self._keys.workers(announcement.member), int(LIST_LEASE * 1000)
        # A server without memory still renews what it has.
        self._connections.run_allowed(
            [(key, ("SET", key, data, "PX", lease)), (key, ("PEXPIRE", key, lease))],
        )

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
        """The announcements of all workers that are alive."""
        members = self._fleet.roster().members
        announced = self._read(member.name for member in members if member.role == "worker" and not member.revoked)
        alive = self.alive("worker", announced)
        return [worker for peer, worker in announced.items() if peer in alive]

    def older_workers(self) -> bool:
        """Whether workers of an older version have announced themselves, which this one cannot use."""
        key = self._keys.old_workers
        return self._connections.run_allowed([(key, ("EXISTS", key))]) == [1]

    def _read(self, members: Iterable[str]) -> dict[bytes, headers.Announce]:
        """The announcements on members' lists, by peer; even of dead ones."""
        members = list(members)
        lists = [self._keys.workers(member) for member in members]
        answers = self._connections.run_allowed([(key, ("GETRANGE", key, 0, MAX_LIST)) for key in lists])
        announced: dict[bytes, headers.Announce] = {}
        for member, data in zip(members, answers, strict=True):
            try:
                announced |= {worker.sender: worker for worker in read_list(member, data)}
            except SplitError as error:
                count_dropped(self._counters, error)
        return announced


def read_list(member: str, data: object) -> list[headers.Announce]:
    """The announcements on a member's list.

    Raises:
        Malformed, Oversized, VersionMismatch: it is damaged, or holds something else.
    """
    if failed(data) or not isinstance(data, bytes):
        raise Malformed("a worker's list is not a string")
    try:
        entries = msgspec.msgpack.decode(data, type=list[bytes]) if data else []
    except msgspec.MsgspecError:
        raise Malformed("a worker's list is damaged") from None
    found, mark = [], member_mark(member)
    for entry in entries:
        header = headers.decode_header(entry)
        if not isinstance(header, headers.Announce) or header.role != "worker" or member_of(header.sender) != mark:
            raise Malformed("an announcement of another member")
        found.append(header)
    return found
