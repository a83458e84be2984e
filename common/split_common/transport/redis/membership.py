"""The other peers: which workers there are, which peers are alive, and how full their lanes are.

The processes of one member share a list of their announcements, which only that member may write and which shows
its certificate. So no worker can remove or change what others announce, or claim a service that is not its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

import msgspec

from split_common.errors import CertificateError, Malformed, SplitError
from split_common.protocol import headers
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.peer_id import mark_of, member_mark
from split_common.transport.placement import Candidate
from split_common.transport.redis.answers import failed
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import RedisConnections
from split_common.transport.supervised import count_dropped
from split_common.trust.fleet import Fleet
from split_common.trust.keys import ModelScope, Role

#: Bytes in a peer's lane above which it takes no message larger than `SMALL_BYTES`. A lane is read in order, so
#: large ones that wait in it delay the next token of everybody else. Padded decoding steps are small: 33 tokens of
#: a width of 4,096 in float32, or of 8,192 in bfloat16, take 544 KiB with all that is around them.
CROWDED_BYTES = 32 * 1024 * 1024
SMALL_BYTES = 640 * 1024

#: Seconds after which a member's list expires unless one of its processes renews it.
LIST_LEASE = 60.0

#: Most bytes of a member's list that are read. A longer one counts as damaged, and its owner begins a new one.
MAX_LIST = 128 * 1024

#: Most processes of a member that are on its list.
MAX_LISTED = 128

#: Heartbeats of a worker between two clean-ups of its member's list.
CLEAN_UP = 10


class Registry:
    """The fleet's peers, as the server knows them. For the housekeeping thread; others may call `takes`.

    Args:
        connections: to the server.
        keys, fleet: names of the fleet's keys, and the fleet, whose roster says which workers there may be.
        certificate: of the member that connects, as the operator signed it; a worker shows it.
        counters: of the link.
    """

    def __init__(
        self, connections: RedisConnections, keys: Keys, fleet: Fleet, certificate: bytes, counters: Counter[str]
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._fleet = fleet
        self._certificate = certificate
        self._counters = counters
        self._beats = 0
        #: The bytes in the lanes of watched peers, when they were last looked at.
        self.sizes: Mapping[bytes, int] = {}
        #: Why workers were left out when `workers` was called last.
        self.turned_away: list[str] = []

    # --- this worker's own entry -----------------------------------------------------------------------------

    def enlist(self, announcement: headers.Announce, tidy: bool = True) -> None:
        """Puts a worker on its member's list, where devices find it, or takes it off it if it leaves.

        If two processes of the member do this at the same time, what one of them wrote is lost until its next
        heartbeat.

        Args:
            announcement: the worker's.
            tidy: whether to take dead processes off the list now and then.
        """
        listed = {
            other.sender: other for _, others in self._read([announcement.member]).values() for other in others
        }
        listed.pop(announcement.sender, None)
        self._beats += 1
        if listed and tidy and self._beats % CLEAN_UP == 0:
            alive = self.alive("worker", listed)
            listed = {peer: other for peer, other in listed.items() if peer in alive}
        # The first one was renewed longest ago.
        others = list(listed.values())
        own = [] if announcement.leaving else [msgspec.structs.replace(announcement, watching=[])]
        data = write_list(self._certificate, [*others, *own])
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
        """Checks the lanes of watched peers, and notes their `sizes`. Returns the peers that are gone."""
        peers = list(peers)
        self.sizes = self.alive(role, peers)
        return [peer for peer in peers if peer not in self.sizes]

    def takes(self, peer: bytes, size: int) -> bool:
        """Whether the lane of a watched peer takes a message of `size` bytes; True if it is not known."""
        return self.sizes.get(peer, 0) <= (QUEUE_BYTES if size <= SMALL_BYTES else CROWDED_BYTES)

    def workers(self) -> list[Candidate]:
        """The workers that are alive and whose certificates hold for their services."""
        members = self._fleet.roster().members
        lists = self._read(member.name for member in members if member.role == "worker" and not member.revoked)
        self.turned_away = []
        found = [worker for name, listed in lists.items() for worker in self._certified(name, *listed)]
        alive = self.alive("worker", (worker.id for worker in found))
        return [worker for worker in found if worker.id in alive]

    def _certified(
        self, member: str, certificate: bytes, announcements: Iterable[headers.Announce]
    ) -> Iterator[Candidate]:
        for one in announcements:
            service = one.service
            if service is None or service.first >= service.last:
                continue
            try:
                scope = ModelScope(service.root, service.first, service.last)
                if self._fleet.verify(certificate, "worker", scope).name != member:
                    raise CertificateError(f"{member!r} shows the certificate of another member")
            except CertificateError as error:
                self.turned_away.append(str(error))
                continue
            yield Candidate(one.sender, service, one.model, one.room, member)

    def older_workers(self) -> bool:
        """Whether workers of an older version have announced themselves, which this one cannot use."""
        key = self._keys.old_workers
        return self._connections.run_allowed([(key, ("EXISTS", key))]) == [1]

    def _read(self, members: Iterable[str]) -> dict[str, tuple[bytes, list[headers.Announce]]]:
        """The certificate and the announcements on each member's list; even of dead processes."""
        members = list(members)
        lists = [self._keys.workers(member) for member in members]
        answers = self._connections.run_allowed([(key, ("GETRANGE", key, 0, MAX_LIST)) for key in lists])
        found = {}
        for member, data in zip(members, answers, strict=True):
            try:
                found[member] = read_list(member, data)
            except SplitError as error:
                count_dropped(self._counters, error)
        return found


def write_list(certificate: bytes, announcements: Sequence[headers.Announce]) -> bytes:
    """What `read_list` reads. If there are too many announcements, the first ones are left out."""
    entries = [headers.encode_header(one) for one in announcements[-MAX_LISTED:]]
    while len(data := msgspec.msgpack.encode((certificate, entries))) > MAX_LIST and entries:
        entries.pop(0)
    return data


def read_list(member: str, data: object) -> tuple[bytes, list[headers.Announce]]:
    """The certificate and the announcements on a member's list.

    Raises:
        Malformed, Oversized, VersionMismatch: it is damaged, or holds something else.
    """
    if failed(data) or not isinstance(data, bytes):
        raise Malformed("a worker's list is not a string")
    if not data:
        return b"", []
    try:
        certificate, entries = msgspec.msgpack.decode(data, type=_WorkerList)
    except (msgspec.MsgspecError, RecursionError):
        raise Malformed("a worker's list is damaged") from None
    found, mark = [], member_mark(member)
    for entry in entries:
        header = headers.decode_header(entry)
        if not isinstance(header, headers.Announce) or header.role != "worker" or mark_of(header.sender) != mark:
            raise Malformed("an announcement of another member")
        found.append(header)
    return certificate, found


#: The member's certificate, and the headers of its processes' announcements.
_WorkerList = tuple[bytes, Annotated[list[bytes], msgspec.Meta(max_length=MAX_LISTED)]]
